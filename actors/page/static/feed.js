// The stream of items: a snapshot, then what changes. `encoding.py` writes it.

const AGAIN_S = [0.5, 1, 2, 4, 8];
// A server sends something every 3 s.
const SILENT_S = 10;
const TYPES = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array };

/** Return a value of an event's JSON, with its arrays. */
export function decoded(value) {
  if (Array.isArray(value)) return value.map(decoded);
  if (value === null || typeof value !== "object") return value;
  const names = Object.keys(value);
  if (names.length === 1 && names[0] in TYPES) return numbers(names[0], value[names[0]]);
  return Object.fromEntries(names.map((name) => [name, decoded(value[name])]));
}

function numbers(type, text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i += 1) bytes[i] = raw.charCodeAt(i);
  // The bytes are little-endian, as all machines are that browsers run on.
  return new TYPES[type](bytes.buffer);
}

/** A copy of the server's items, which follows them. */
export class Feed {
  /** `onItems(names)` is told what changed, `onLink(state)`: connecting, live, lost, ended. */
  constructor(address, onItems, onLink) {
    this.items = new Map();
    this.events = 0;
    this.heardAt = 0;
    this._address = address;
    this._onItems = onItems;
    this._onLink = onLink;
    this._revision = "";
    this._tries = 0;
    this._source = null;
    this._connect();
    setInterval(() => this._look(), 1000);
  }

  /** Return the items whose names begin with `prefix`, by the rest of their names. */
  group(prefix) {
    const found = new Map();
    for (const [name, value] of this.items) {
      if (name.startsWith(prefix)) found.set(name.slice(prefix.length), value);
    }
    return found;
  }

  _connect() {
    const source = new EventSource(this._address);
    this._source = source;
    source.addEventListener("snapshot", (event) => this._take(JSON.parse(event.data), true));
    source.addEventListener("delta", (event) => this._take(JSON.parse(event.data), false));
    source.addEventListener("beat", () => this._heard());
    source.addEventListener("end", () => {
      this._close();
      this._onLink("ended");
      this._later();
    });
    source.onerror = () => this._lost();
  }

  _take(told, whole) {
    if (!whole && String(told.from) !== this._revision) {
      this._lost();
      return;
    }
    const changed = new Set(Object.keys(told.items));
    if (whole) {
      for (const name of this.items.keys()) changed.add(name);
      this.items.clear();
    } else {
      for (const name of told.removed) {
        this.items.delete(name);
        changed.add(name);
      }
    }
    for (const [name, value] of Object.entries(told.items)) this.items.set(name, decoded(value));
    this._revision = String(told.to);
    this.events += 1;
    this._heard();
    this._onItems(changed);
  }

  _heard() {
    this.heardAt = performance.now();
    this._tries = 0;
    this._onLink("live");
  }

  _look() {
    const silent = this._source && this.heardAt && performance.now() - this.heardAt > 1000 * SILENT_S;
    if (silent) this._lost();
  }

  _lost() {
    if (!this._source) return;
    this._close();
    this._onLink("lost");
    this._later();
  }

  _close() {
    if (this._source) this._source.close();
    this._source = null;
    this.heardAt = 0;
  }

  _later() {
    const wait = AGAIN_S[Math.min(this._tries, AGAIN_S.length - 1)];
    this._tries += 1;
    setTimeout(() => this._connect(), 1000 * wait);
  }
}
