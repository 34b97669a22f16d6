// Small curves over time.

const KEPT_S = 300;

/** Values of the last minutes. */
export class Curve {
  constructor(canvas, { color = "--bar", least = 0 } = {}) {
    this._canvas = canvas;
    this._color = color;
    this._least = least;
    this._points = [];
  }

  /** Add a value; null is a gap. Values within half a second replace each other. */
  add(value, now = performance.now() / 1000) {
    const last = this._points.at(-1);
    if (last && now - last[0] < 0.5) last[1] = value;
    else this._points.push([now, value]);
    while (this._points.length && now - this._points[0][0] > KEPT_S) this._points.shift();
  }

  clear() {
    this._points = [];
  }

  draw() {
    const canvas = this._canvas;
    const dpr = window.devicePixelRatio || 1;
    const w = canvas.clientWidth;
    const h = canvas.clientHeight;
    if (!w || !h) return;
    if (canvas.width !== Math.round(w * dpr)) canvas.width = Math.round(w * dpr);
    if (canvas.height !== Math.round(h * dpr)) canvas.height = Math.round(h * dpr);
    const ctx = canvas.getContext("2d");
    ctx.setTransform(dpr, 0, 0, dpr, 0, 0);
    ctx.clearRect(0, 0, w, h);
    const points = this._points;
    const known = points.filter(([, value]) => value !== null).map(([, value]) => value);
    if (known.length < 2) return;
    const low = Math.min(this._least ?? Infinity, ...known);
    const high = Math.max(...known, low + 1e-9);
    const [from, to] = [points[0][0], points.at(-1)[0]];
    const at = ([when, value]) => [
      ((when - from) / Math.max(1e-9, to - from)) * w,
      h - 1.5 - ((value - low) / (high - low)) * (h - 4),
    ];
    const color = getComputedStyle(canvas).getPropertyValue(this._color).trim();
    const line = new Path2D();
    let open = false;
    for (const point of points) {
      if (point[1] === null) {
        open = false;
        continue;
      }
      const [x, y] = at(point);
      if (open) line.lineTo(x, y);
      else line.moveTo(x, y);
      open = true;
    }
    ctx.strokeStyle = color;
    ctx.lineWidth = 1.5;
    ctx.lineJoin = "round";
    ctx.stroke(line);
    if (!points.some(([, value]) => value === null)) {
      line.lineTo(w, h);
      line.lineTo(0, h);
      ctx.globalAlpha = 0.14;
      ctx.fillStyle = color;
      ctx.fill(line);
      ctx.globalAlpha = 1;
    }
  }
}
