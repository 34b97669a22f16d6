// The heat map of one model on two canvases: cells, and what is written and drawn over them.

import { SHADES, maps } from "./colors.js";

const AXIS = 34;
const STRIP = 76;
const TOP = 20;
const GLIDE_S = 0.16;
const HOT_PART = 0.9985;
const STEPS = [1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 256, 512, 1024];
const NICE = [1, 1.5, 2, 3, 5, 7, 10];
// The balancedness view goes from 2/3 of the mean to 3/2 of it.
const EVEN_SPAN = 2 * Math.log(1.5);

const still = matchMedia("(prefers-reduced-motion: reduce)");
const darkly = matchMedia("(prefers-color-scheme: dark)");

/**
 * Return where a load is on the colours, from its part of the scale. Most experts are far below the
 * hottest and are to differ, too; on a light page they would be too much ink.
 */
export function loadPart(part) {
  return Math.min(1, part) ** (darkly.matches ? 0.72 : 1);
}

export class HeatMap {
  /** `onChoice(cell, point)`: a cell is pointed at or chosen; `point` is null without a pointer. */
  constructor(plot, map, marks, onChoice) {
    this.view = "load";
    this.model = null;
    this.moves = [];
    this.chosen = null; // {row, expert}
    this.pointed = null;
    this.most = 1; // the load at the top of the scale
    this._plot = plot;
    this._map = map;
    this._marks = marks;
    this._onChoice = onChoice;
    this._small = document.createElement("canvas");
    this._cells = new Float32Array(0);
    this._goal = new Float32Array(0);
    this._bars = new Float32Array(0);
    this._frame = 0;
    this._at = 0;
    this._tables = maps(darkly.matches);
    darkly.addEventListener("change", () => {
      this._tables = maps(darkly.matches);
      this.update();
    });
    new ResizeObserver(() => this._layout()).observe(plot);
    this._listen();
  }

  get colors() {
    return this._tables[this.view];
  }

  /** Show another model, or none. */
  setModel(model) {
    this.model = model;
    this.chosen = this.pointed = null;
    this.most = 1;
    if (model) {
      this._cells = new Float32Array(4 * model.load.length);
      this._goal = new Float32Array(4 * model.load.length);
      this._bars = new Float32Array(model.height);
      this._small.width = model.width;
      this._small.height = model.height;
      this._image = this._small.getContext("2d").createImageData(model.width, model.height);
    }
    this._layout();
    this.update();
  }

  setView(view) {
    this.view = view;
    this.update();
  }

  /** Take in that values of the model have changed. */
  update() {
    if (this.model) {
      this._scale();
      this._aim();
    }
    this._wake();
  }

  /** Return [low, high], what the ends of the colours mean. */
  get legend() {
    if (this.view === "load") return ["0", `≥ ${Math.round(this.most).toLocaleString("en")} / s`];
    if (this.view === "replicas") return ["1", `${this._mostReplicas()}`];
    return ["⅔ of the mean", "1.5 ×"];
  }

  // ---- values to colours --------------------------------------------------------------------------

  _scale() {
    // The few hottest experts share the last colour; else all others would be dark because of them.
    const sorted = Float32Array.from(this.model.load).sort();
    const top = sorted[Math.floor(HOT_PART * (sorted.length - 1))];
    if (top > this.most || top < 0.45 * this.most) {
      const ten = 10 ** Math.floor(Math.log10(Math.max(1, top)));
      this.most = ten * NICE.find((one) => one * ten >= Math.max(1, top));
    }
  }

  _mostReplicas() {
    let most = 2;
    for (const count of this.model.replicas) if (count > most) most = count;
    return most;
  }

  _aim() {
    const { load, replicas, even, there, placed, width } = this.model;
    const colors = this.colors;
    const goal = this._goal;
    const most = this._mostReplicas();
    const lost = darkly.matches ? [255, 59, 92] : [214, 0, 52];
    for (let i = 0; i < load.length; i += 1) {
      const at = 4 * i;
      if (!there[i]) {
        goal[at + 3] = 0;
        continue;
      }
      goal[at + 3] = 255;
      if (replicas[i] === 0 && placed[Math.floor(i / width)]) {
        [goal[at], goal[at + 1], goal[at + 2]] = lost;
        continue;
      }
      let part;
      if (this.view === "load") part = loadPart(load[i] / this.most);
      else if (this.view === "replicas") part = (replicas[i] - 1) / (most - 1);
      else part = 0.5 + Math.log(Math.max(even[i], 1e-3)) / EVEN_SPAN;
      const shade = 3 * Math.round(Math.max(0, Math.min(1, part)) * (SHADES - 1));
      goal[at] = colors[shade];
      goal[at + 1] = colors[shade + 1];
      goal[at + 2] = colors[shade + 2];
    }
  }

  // ---- frames -------------------------------------------------------------------------------------

  _wake() {
    if (!this._frame) {
      this._at = performance.now();
      this._frame = requestAnimationFrame((now) => this._draw(now));
    }
  }

  _draw(now) {
    this._frame = 0;
    const model = this.model;
    const ctx = this._map.getContext("2d");
    ctx.clearRect(0, 0, this._map.width, this._map.height);
    if (!model || !this._place) {
      this._marks.getContext("2d").clearRect(0, 0, this._marks.width, this._marks.height);
      return;
    }
    const seconds = Math.min(0.1, Math.max(0.001, (now - this._at) / 1000));
    this._at = now;
    const glides = this._glide(still.matches ? 1 : 1 - Math.exp(-seconds / GLIDE_S));
    const { x, y, cw, rh, dpr } = this._place;
    this._small.getContext("2d").putImageData(this._image, 0, 0);
    ctx.imageSmoothingEnabled = false;
    ctx.drawImage(this._small, x * dpr, y * dpr, model.width * cw * dpr, model.height * rh * dpr);
    this._gaps(ctx);
    this._mark(now);
    // Rings of moves breathe.
    const breathes = this.moves.length > 0 && !still.matches;
    if (glides || breathes) this._frame = requestAnimationFrame((next) => this._draw(next));
  }

  _glide(part) {
    const { _cells: cells, _goal: goal } = this;
    const pixels = this._image.data;
    let most = 0;
    for (let i = 0; i < cells.length; i += 1) {
      const step = goal[i] - cells[i];
      const size = step < 0 ? -step : step;
      if (size > most) most = size;
      cells[i] = size < 0.6 ? goal[i] : cells[i] + step * part;
      pixels[i] = cells[i];
    }
    this.model.rows.forEach((value, row) => {
      const step = (Number.isNaN(value) ? 0 : value) - this._bars[row];
      if (Math.abs(step) > 0.002) most = Math.max(most, 1);
      this._bars[row] += step * part;
    });
    return most >= 0.6;
  }

  _gaps(ctx) {
    const { x, y, cw, rh, dpr } = this._place;
    if (cw < 6 || rh < 6) return;
    const { width, height } = this.model;
    ctx.globalCompositeOperation = "destination-out";
    for (let i = 1; i < width; i += 1) ctx.fillRect(Math.round((x + i * cw) * dpr) - 1, y * dpr, dpr, height * rh * dpr);
    for (let i = 1; i < height; i += 1) ctx.fillRect(x * dpr, Math.round((y + i * rh) * dpr) - 1, width * cw * dpr, dpr);
    ctx.globalCompositeOperation = "source-over";
  }

  // ---- axes, bars and rings -----------------------------------------------------------------------

  _mark(now) {
    const { x, y, cw, rh, dpr, w } = this._place;
    const model = this.model;
    const ctx = this._marks.getContext("2d");
    const style = getComputedStyle(this._plot);
    const ink = style.getPropertyValue("--ink").trim();
    const dim = style.getPropertyValue("--dim").trim();
    ctx.setTransform(dpr, 0, 0, dpr, 0, 0);
    ctx.clearRect(0, 0, this._marks.width, this._marks.height);
    ctx.font = `11px ${style.fontFamily}`;
    ctx.fontVariantCaps = "normal";
    ctx.textBaseline = "middle";
    const at = this.pointed || this.chosen;
    ctx.textAlign = "right";
    const rows = STEPS.find((one) => one * rh >= 15) || 1;
    model.layers.forEach((layer, row) => {
      const here = at && at.row === row;
      if (row % rows && !here) return;
      if (at && !here && Math.abs(at.row - row) * rh < 12) return;
      ctx.fillStyle = here ? ink : dim;
      ctx.fillText(layer, x - 8, y + (row + 0.5) * rh);
    });
    ctx.textAlign = "center";
    const columns = STEPS.find((one) => one * cw >= 44) || 1;
    for (let expert = 0; expert < model.width; expert += 1) {
      const here = at && at.expert === expert;
      if (expert % columns && !here) continue;
      if (at && !here && Math.abs(at.expert - expert) * cw < 28) continue;
      ctx.fillStyle = here ? ink : dim;
      ctx.fillText(expert, x + (expert + 0.5) * cw, y - 9);
    }
    this._strip(ctx, style, at, x + model.width * cw + 14, w);
    this._rings(ctx, style, now);
  }

  _strip(ctx, style, at, left, w) {
    const { y, rh } = this._place;
    const room = w - left - 34;
    if (room < 16) return;
    const colors = ["--bad", "--warm", "--calm"].map((name) => style.getPropertyValue(name).trim());
    const dim = style.getPropertyValue("--dim").trim();
    ctx.fillStyle = dim;
    ctx.textAlign = "left";
    ctx.fillText(room > 70 ? "balancedness" : "even", left, y - 9);
    ctx.fillStyle = style.getPropertyValue("--line").trim();
    ctx.fillRect(left + room, y, 1, this.model.height * rh);
    this._bars.forEach((value, row) => {
      const known = !Number.isNaN(this.model.rows[row]);
      const here = at && at.row === row;
      if (known) {
        ctx.fillStyle = colors[value < 0.5 ? 0 : value < 0.75 ? 1 : 2];
        const thick = Math.max(1, Math.min(8, rh - 2));
        ctx.fillRect(left, y + (row + 0.5) * rh - thick / 2, room * value, thick);
      }
      if (known && (here || (rh >= 14 && !at))) {
        ctx.fillStyle = here ? style.getPropertyValue("--ink").trim() : dim;
        ctx.fillText(value.toFixed(2), left + room + 6, y + (row + 0.5) * rh);
      }
    });
  }

  _rings(ctx, style, now) {
    const { x, y, cw, rh } = this._place;
    const model = this.model;
    const wide = Math.max(cw, 5);
    const high = Math.max(rh, 5);
    const ring = (row, expert, grow) => {
      const left = x + (expert + 0.5) * cw - wide / 2 - grow;
      ctx.strokeRect(left, y + (row + 0.5) * rh - high / 2 - grow, wide + 2 * grow, high + 2 * grow);
    };
    const breath = still.matches ? 0.9 : 0.55 + 0.45 * Math.sin(now / 260);
    ctx.globalAlpha = breath;
    ctx.strokeStyle = style.getPropertyValue("--move").trim();
    ctx.lineWidth = 1.5;
    for (const [name, layer, expert] of this.moves) {
      const row = model.layers.indexOf(layer);
      if (name === model.name && row >= 0) ring(row, expert, 1.25);
    }
    ctx.globalAlpha = 1;
    for (const [cell, grow] of [[this.chosen, 2], [this.pointed, 1]]) {
      if (!cell) continue;
      ctx.lineWidth = 3.5;
      ctx.strokeStyle = style.getPropertyValue("--panel").trim();
      ring(cell.row, cell.expert, grow);
      ctx.lineWidth = 1.5;
      ctx.strokeStyle = style.getPropertyValue("--ink").trim();
      ring(cell.row, cell.expert, grow);
    }
  }

  // ---- places -------------------------------------------------------------------------------------

  _layout() {
    const model = this.model;
    const w = this._plot.clientWidth;
    if (!model || !w) return;
    const dpr = Math.max(1, window.devicePixelRatio || 1);
    const room = (w - AXIS - STRIP) / model.width;
    // Whole pixels, so that all cells are alike, unless that leaves much of the page empty.
    let cw = Math.min(96, Math.floor(room * dpr) / dpr);
    if (cw < 0.85 * Math.min(96, room)) cw = room;
    const rh = Math.max(4, Math.min(24, Math.floor(500 / model.height)));
    const h = TOP + model.height * rh + 6;
    this._place = { x: AXIS, y: TOP, cw, rh, dpr, w };
    for (const canvas of [this._map, this._marks]) {
      canvas.width = Math.round(w * dpr);
      canvas.height = Math.round(h * dpr);
      canvas.style.width = `${w}px`;
      canvas.style.height = `${h}px`;
    }
    this._plot.style.height = `${h}px`;
    this._wake();
  }

  _cellAt(event) {
    if (!this.model || !this._place) return null;
    const { x, y, cw, rh } = this._place;
    const box = this._plot.getBoundingClientRect();
    const expert = Math.floor((event.clientX - box.left - x) / cw);
    const row = Math.floor((event.clientY - box.top - y) / rh);
    const inside = row >= 0 && row < this.model.height && expert >= 0 && expert < this.model.experts[row];
    return inside ? { row, expert } : null;
  }

  _listen() {
    const plot = this._plot;
    plot.addEventListener("pointermove", (event) => {
      this.pointed = this._cellAt(event);
      this._tell(this.pointed && { x: event.clientX, y: event.clientY });
    });
    plot.addEventListener("pointerleave", () => {
      this.pointed = null;
      this._tell(null);
    });
    plot.addEventListener("click", (event) => {
      this.chosen = this._cellAt(event);
      this._tell(null);
    });
    plot.addEventListener("keydown", (event) => this._key(event));
  }

  _key(event) {
    const model = this.model;
    if (!model || event.ctrlKey || event.altKey || event.metaKey) return;
    const { row, expert } = this.chosen || { row: 0, expert: -1 };
    const to = {
      ArrowLeft: [row, expert - 1],
      ArrowRight: [row, expert + 1],
      ArrowUp: [row - 1, Math.max(0, expert)],
      ArrowDown: [this.chosen ? row + 1 : row, Math.max(0, expert)],
      PageUp: [row - 10, Math.max(0, expert)],
      PageDown: [row + 10, Math.max(0, expert)],
      Home: [row, 0],
      End: [row, Infinity],
    }[event.key];
    if (event.key === "Escape") this.chosen = null;
    else if (to) this.choose(...to);
    else return;
    event.preventDefault();
    this._tell(null);
  }

  /** Choose a cell, or the nearest that there is. */
  choose(row, expert) {
    const near = Math.max(0, Math.min(this.model.height - 1, row));
    this.chosen = { row: near, expert: Math.max(0, Math.min(this.model.experts[near] - 1, expert)) };
    this._tell(null);
  }

  _tell(point) {
    this._onChoice(this.pointed || this.chosen, point);
    this._wake();
  }
}
