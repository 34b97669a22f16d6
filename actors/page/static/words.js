// Numbers and times as words, and elements.

const GROUPED = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const FEW = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

/** 12,345 or 12.3. */
export function number(value) {
  return Math.abs(value) < 100 ? FEW.format(value) : GROUPED.format(value);
}

/** 3.2 M for what need not be exact. */
export function rough(value) {
  for (const [size, unit] of [[1e9, " G"], [1e6, " M"], [1e4, " k"]]) {
    if (value >= size) {
      const part = value / (unit === " k" ? 1e3 : size);
      return (part < 100 ? part.toFixed(1) : GROUPED.format(part)) + unit;
    }
  }
  return number(value);
}

export function bytes(value) {
  for (const [size, unit] of [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (value >= size) return `${(value / size).toFixed(value / size < 100 ? 1 : 0)} ${unit}`;
  }
  return `${value} B`;
}

export function percent(value, digits = 0) {
  return `${(100 * value).toFixed(digits)} %`;
}

/** The time of day, with the day if it is another one. */
export function time(unixS) {
  const moment = new Date(1000 * unixS);
  const words = moment.toLocaleTimeString("en-GB");
  if (moment.toDateString() === new Date().toDateString()) return words;
  return `${moment.toLocaleDateString("en-GB", { day: "numeric", month: "short" })} ${words.slice(0, 5)}`;
}

export function seconds(value) {
  if (value < 100) return `${FEW.format(value)} s`;
  return value < 6000 ? `${Math.round(value / 60)} min` : `${FEW.format(value / 3600)} h`;
}

/** "1 replica", "2 replicas". */
export function many(count, word) {
  return `${GROUPED.format(count)} ${word}${count === 1 ? "" : "s"}`;
}

/** Set an element's text, if it is another one: so nothing is laid out for nothing. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Make an element with a class and children (elements or text). */
export function make(tag, kind = "", ...children) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  made.append(...children);
  return made;
}

/** Bring the rows of `parent` to the `wanted` ones, [key, fill]; a row is made once. */
export function rows(parent, wanted, makeRow) {
  const old = new Map([...parent.children].map((row) => [row.dataset.key, row]));
  let before = parent.firstElementChild;
  for (const [key, fill] of wanted) {
    let row = old.get(key);
    if (row) old.delete(key);
    else {
      row = makeRow();
      row.dataset.key = key;
    }
    if (row !== before) parent.insertBefore(row, before);
    else before = before.nextElementSibling;
    fill(row);
  }
  for (const row of old.values()) row.remove();
}
