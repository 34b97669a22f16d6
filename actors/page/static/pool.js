// What the items say of one model: loads, replicas and balancedness of every expert.

export const LOAD_UNITS = 10;
export const SHARE_UNITS = 10000;
export const EVEN_UNITS = 10000;
const NO_LOAD = 0xffff;

/** One model as flat arrays, a row of `width` cells for each layer. */
export class Model {
  constructor(name, told) {
    this.name = name;
    this.told = told;
    this.layers = told.layers;
    this.experts = told.experts;
    this.height = this.layers.length;
    this.width = Math.max(1, ...this.experts);
    const cells = this.height * this.width;
    this.load = new Float32Array(cells); // assignments a second
    this.replicas = new Float32Array(cells);
    this.even = new Float32Array(cells); // load of its hosts in this layer / the mean; 1 is even
    this.there = new Uint8Array(cells); // 1: an expert; 0: beyond the last one of its layer
    this.rows = new Float32Array(this.height).fill(NaN); // balancedness of each layer
    this.sums = new Float64Array(this.height);
    this.placed = new Array(this.height).fill(null);
    this.starts = new Array(this.height).fill(null);
    this.experts.forEach((count, row) => this.there.fill(1, row * this.width, row * this.width + count));
  }

  /** Whether an item describes the same cells. */
  fits(told) {
    return String(told.layers) === String(this.layers) && String(told.experts) === String(this.experts);
  }

  /** Take in the items of all layers, or of those whose names are in `changed`. */
  take(items, changed) {
    const speeds = hostSpeeds(items);
    this.layers.forEach((layer, row) => {
      const load = `load:${layer}:${this.name}`;
      const place = `place:${layer}:${this.name}`;
      if (changed && !changed.has(load) && !changed.has(place)) return;
      this._takeLoad(row, items.get(load));
      this._takePlace(row, items.get(place));
      this._takeEven(row, speeds);
    });
    const even = items.get(`even:${this.name}`);
    for (let row = 0; row < this.height; row += 1) {
      const units = even ? even[row] : NO_LOAD;
      this.rows[row] = units === NO_LOAD ? NaN : units / EVEN_UNITS;
    }
  }

  _takeLoad(row, tenths) {
    const start = row * this.width;
    let sum = 0;
    for (let expert = 0; expert < this.experts[row]; expert += 1) {
      const value = tenths ? tenths[expert] / LOAD_UNITS : 0;
      this.load[start + expert] = value;
      sum += value;
    }
    this.sums[row] = sum;
  }

  _takePlace(row, placed) {
    const start = row * this.width;
    const starts = new Uint32Array(this.experts[row] + 1);
    for (let expert = 0; expert < this.experts[row]; expert += 1) {
      const count = placed ? placed.counts[expert] : 0;
      this.replicas[start + expert] = count;
      starts[expert + 1] = starts[expert] + count;
    }
    this.placed[row] = placed || null;
    this.starts[row] = starts;
  }

  _takeEven(row, speeds) {
    const placed = this.placed[row];
    const start = row * this.width;
    const loads = new Map();
    this._each(row, (expert, host, share) => {
      loads.set(host, (loads.get(host) || 0) + this.load[start + expert] * share);
    });
    const mean = this.sums[row] / Math.max(1e-9, speeds.total);
    this.even.fill(1, start, start + this.experts[row]);
    if (!placed || !(mean > 0)) return;
    this.even.fill(0, start, start + this.experts[row]);
    this._each(row, (expert, host, share) => {
      this.even[start + expert] += (share * loads.get(host)) / (speeds.of[host] || 1) / mean;
    });
  }

  _each(row, take) {
    const placed = this.placed[row];
    if (!placed) return;
    const starts = this.starts[row];
    for (let expert = 0; expert < this.experts[row]; expert += 1) {
      for (let i = starts[expert]; i < starts[expert + 1]; i += 1) {
        take(expert, placed.hosts[i], placed.shares[i] / SHARE_UNITS);
      }
    }
  }

  /** Return an expert's replicas as [name of the host, share], the preferred one first. */
  hosts(row, expert, names) {
    const placed = this.placed[row];
    if (!placed) return [];
    const found = [];
    for (let i = this.starts[row][expert]; i < this.starts[row][expert + 1]; i += 1) {
      found.push([names[placed.hosts[i]] ?? "?", placed.shares[i] / SHARE_UNITS]);
    }
    return found;
  }

  /** Return all assignments a second. */
  get total() {
    return this.sums.reduce((sum, one) => sum + one, 0);
  }

  /** Return the cells with the most load, the hottest first. */
  hottest(count) {
    const best = [];
    let least = 0;
    for (let cell = 0; cell < this.load.length; cell += 1) {
      if (this.load[cell] <= least) continue;
      best.push(cell);
      if (best.length >= 8 * count) least = this._cut(best, count);
    }
    this._cut(best, count);
    return best;
  }

  _cut(best, count) {
    best.sort((one, other) => this.load[other] - this.load[one] || one - other);
    best.length = Math.min(best.length, count);
    return best.length < count ? 0 : this.load[best[count - 1]];
  }
}

function hostSpeeds(items) {
  const names = items.get("names") || [];
  const of = [];
  let total = 0;
  names.forEach((name, index) => {
    const host = items.get(`host:${name}`);
    of[index] = host ? host.speed : 1;
    if (host && !host.draining) total += host.speed;
  });
  return { of, total };
}

/** Return all cells as text keys, for tests: `model/layer/expert` -> [load, hosts]. */
export function everyExpert(model, names) {
  const found = {};
  model.layers.forEach((layer, row) => {
    for (let expert = 0; expert < model.experts[row]; expert += 1) {
      const load = Math.round(model.load[row * model.width + expert] * LOAD_UNITS) / LOAD_UNITS;
      const hosts = Object.fromEntries(model.hosts(row, expert, names));
      found[`${model.name}/${layer}/${expert}`] = [load, hosts];
    }
  });
  return found;
}
