// The page: it listens to the feed, and brings the panels to what the items say, once a frame.

import { Operator, askHost, askPin, askRebalance, askReplicate, askScale, askUnlock } from "./actions.js";
import { Curve } from "./charts.js";
import { SHADES } from "./colors.js";
import { Feed } from "./feed.js";
import { HeatMap, loadPart } from "./heatmap.js";
import { showEngines, showEvents, showFigures, showHosts, showHottest, showMoves, showTraining } from "./panels.js";
import { Model, everyExpert } from "./pool.js";
import { many, number, percent, rows, make, say, time } from "./words.js";

const $ = (id) => document.getElementById(id);
const SHOWN_MODEL = "moesaic-model";

const models = new Map();
let waiting = new Set();
let link = "connecting";
let lastHeard = 0;

const curves = {
  load: new Curve($("s-load"), { color: "--accent" }),
  requests: new Curve($("s-requests"), { color: "--accent" }),
  even: new Curve($("s-even"), { color: "--accent", least: 0.5 }),
  steps: new Curve($("c-steps"), { color: "--accent", least: null }),
  pace: new Curve($("c-pace"), { color: "--accent" }),
  work: new Curve($("c-work"), { color: "--accent" }),
};

const map = new HeatMap($("plot"), $("map"), $("marks"), showChoice);
const operator = new Operator(showOperator);
const feed = new Feed("events", onItems, onLink);

// ---- the stream -----------------------------------------------------------------------------------

function onItems(names) {
  if (!waiting.size) requestAnimationFrame(show);
  for (const name of names) waiting.add(name);
  lastHeard = Date.now() / 1000;
}

function onLink(state) {
  link = state;
  showLink();
}

function show() {
  const changed = waiting;
  waiting = new Set();
  const has = (...prefixes) => [...changed].some((name) => prefixes.some((one) => name.startsWith(one)));
  if (has("model:", "load:", "place:", "even:", "names", "host:")) takeModels(changed);
  if (has("model:", "load:", "place:", "even:")) {
    map.update();
    showLegend();
    showMapState();
    showHottest(map.model, feed.items.get("names") || [], (row, expert) => {
      map.choose(row, expert);
      $("plot").scrollIntoView({ block: "nearest" });
    });
  }
  if (has("load:", "place:", "wishes")) showChoice(map.pointed || map.chosen, null, true);
  if (has("moves", "health")) {
    map.moves = feed.items.get("moves") || [];
    map.update();
    showMoves(feed);
  }
  if (has("host:", "health")) showPoolHosts();
  if (has("changes", "scalings", "events")) showEvents(feed);
  if (has("changes")) showMoves(feed);
  if (has("own:")) showEngines(feed);
  if (has("link")) showLink();
  if (has("groups", "wishes")) showOperator();
  const name = feed.items.get("health")?.cluster;
  if (name) {
    say($("cluster"), name);
    document.title = `${name} · Moesaic`;
  }
  showFigures(feed, models, curves);
  showTraining(feed, models, curves);
  for (const curve of Object.values(curves)) curve.draw();
}

function takeModels(changed) {
  const told = feed.group("model:");
  let other = false;
  for (const name of models.keys()) {
    if (!told.has(name)) {
      models.delete(name);
      other = true;
    }
  }
  for (const [name, one] of told) {
    if (!models.has(name) || !models.get(name).fits(one)) {
      models.set(name, new Model(name, one));
      models.get(name).take(feed.items, null);
      other = true;
    } else {
      models.get(name).told = one;
      models.get(name).take(feed.items, changed.has("names") ? null : changed);
    }
  }
  if (other || (map.model && models.get(map.model.name) !== map.model)) chooseModel();
}

function chooseModel() {
  const select = $("model");
  const names = [...models.keys()].sort();
  const wish = select.value || sessionStorage.getItem(SHOWN_MODEL);
  rows(select, names.map((name) => [name, (option) => {
    say(option, name);
    option.value = name;
  }]), () => make("option"));
  const name = names.includes(wish) ? wish : names[0];
  if (name !== undefined) select.value = name;
  map.setModel(models.get(name) || null);
}

// ---- words ----------------------------------------------------------------------------------------

function showLink() {
  const problem = feed.items.get("link")?.error;
  const state = link === "live" && problem ? "stale" : link;
  document.body.dataset.link = state;
  say($("link-words"), { connecting: "connecting", live: "live", stale: "no answer", lost: "reconnecting", ended: "ended" }[state]);
  const seen = lastHeard ? ` What you see is from ${time(lastHeard)}.` : "";
  const words = {
    stale: `The controller does not answer: ${problem}. Serving goes on without it; the page shows the last state that it told.`,
    lost: `The connection to the cluster is lost; the page connects again by itself.${seen}`,
    ended: `This cluster's endpoint has ended; the page connects again if it comes back.${seen}`,
  }[state] || warnings();
  const banner = $("banner");
  banner.hidden = !words;
  say(banner, words);
  banner.dataset.kind = state;
}

function warnings() {
  const health = feed.items.get("health");
  const groups = feed.items.get("groups");
  if (!health) return "";
  return [...health.warnings, health.error, groups && groups.problem].filter(Boolean).join("; ");
}

function showMapState() {
  const empty = $("map-empty");
  const model = map.model;
  let words = "";
  if (!model) words = "The cluster serves no model yet.";
  else if (model.told.asleep) words = `${model.name} is asleep: it had no request for a while. The next one wakes it.`;
  else if (!model.placed.some(Boolean)) words = "No expert is placed yet.";
  empty.hidden = !words;
  say(empty, words);
  const most = model ? model.hottest(1)[0] : undefined;
  const hottest = most === undefined ? "no expert has load" : `the hottest is expert ${most % model.width} of layer ${model.layers[Math.floor(most / model.width)]}`;
  say($("map-title"), model ? `${many(model.height, "layer")} × ${many(model.width, "expert")}` : "Experts");
  const words2 = model ? `Heat map of ${model.name}: a row for each of ${model.height} layers, a column for each expert; ${hottest}. The arrow keys choose an expert.` : "Heat map: no model";
  if ($("plot").getAttribute("aria-label") !== words2 && document.activeElement !== $("plot")) $("plot").setAttribute("aria-label", words2);
}

function showLegend() {
  const [low, high] = map.legend;
  say($("legend-low"), low);
  say($("legend-high"), high);
  const canvas = $("legend");
  canvas.width = SHADES;
  canvas.height = 1;
  const ctx = canvas.getContext("2d");
  const image = ctx.createImageData(SHADES, 1);
  const colors = map.colors;
  for (let i = 0; i < SHADES; i += 1) {
    const part = i / (SHADES - 1);
    const shade = 3 * Math.round((map.view === "load" ? loadPart(part) : part) * (SHADES - 1));
    image.data.set([colors[shade], colors[shade + 1], colors[shade + 2], 255], 4 * i);
  }
  ctx.putImageData(image, 0, 0);
}

function showChoice(cell, point, same = false) {
  const tip = $("tip");
  const model = map.model;
  showButtons();
  if (!cell || !model) {
    tip.hidden = true;
    if (!same || !map.chosen) say($("chosen-words"), "Point at an expert, or choose one with the arrow keys.");
    return;
  }
  const index = cell.row * model.width + cell.expert;
  const names = feed.items.get("names") || [];
  const placed = model.hosts(cell.row, cell.expert, names);
  const hosts = placed.map(([host, share]) => (placed.length > 1 ? `${host} ${percent(share)}` : host));
  const layer = model.layers[cell.row];
  const load = model.load[index];
  const part = model.sums[cell.row] ? `, ${percent(load / model.sums[cell.row], 2)} of its layer` : "";
  const even = load ? `; its hosts have ${model.even[index].toFixed(2)} × the mean` : "";
  const where = hosts.length ? `on ${hosts.join(", ")}` : "on no host";
  const wishes = wishesFor(model.name, layer, cell.expert);
  say($("chosen-words"), `Layer ${layer}, expert ${cell.expert}: ${number(load)} assignments / s${part}, ${where}${even}${wishes}`);
  if (point || (same && !tip.hidden)) {
    say(tip, `layer ${layer} · expert ${cell.expert}\n${number(load)} / s${part}\n${many(hosts.length, "replica")} ${where}`);
  }
  if (point) {
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.min(innerWidth - box.width - 8, point.x + 16)}px`;
    tip.style.top = `${point.y + 18 + box.height > innerHeight ? point.y - box.height - 12 : point.y + 18}px`;
  } else if (!same) tip.hidden = true;
}

function wishesFor(model, layer, expert) {
  const wishes = feed.items.get("wishes");
  if (!wishes) return "";
  const mine = (one) => one[0] === model && one[1] === layer && one[2] === expert;
  const pins = wishes.pins.find(mine);
  const least = wishes.min_replicas.find(mine);
  return (pins ? `; pinned to ${pins[3].join(", ")}` : "") + (least ? `; at least ${many(least[3], "replica")}` : "");
}

function chosenExpert() {
  const cell = map.chosen;
  if (!cell || !map.model) return null;
  return { model: map.model.name, layer: map.model.layers[cell.row], expert: cell.expert };
}

function pinsOf({ model, layer, expert }) {
  const pins = feed.items.get("wishes")?.pins || [];
  return pins.find((one) => one[0] === model && one[1] === layer && one[2] === expert)?.[3] || [];
}

function showOperator() {
  say($("key-words"), operator.words);
  const may = operator.may;
  document.body.toggleAttribute("data-operator", may);
  say($("unlock"), may ? "Lock" : "Unlock…");
  showButtons();
  showPoolHosts();
}

function showButtons() {
  const may = operator.may;
  const chosen = chosenExpert();
  $("rebalance").disabled = !may;
  $("scale").disabled = !may || !(feed.items.get("groups")?.groups.length > 0);
  $("pin").disabled = $("replicate").disabled = !may || !chosen;
  $("unpin").disabled = !may || !chosen || !pinsOf(chosen).length;
}

function showPoolHosts() {
  const obstacles = feed.items.get("health")?.obstacles || {};
  showHosts(feed, obstacles, operator.may, (action, host) => askHost(operator, action, host, feed));
}

// ---- what people do -------------------------------------------------------------------------------

for (const button of document.querySelectorAll("[data-view]")) {
  button.addEventListener("click", () => {
    for (const one of document.querySelectorAll("[data-view]")) one.setAttribute("aria-pressed", String(one === button));
    map.setView(button.dataset.view);
    showLegend();
  });
}
$("model").addEventListener("change", () => {
  sessionStorage.setItem(SHOWN_MODEL, $("model").value);
  map.setModel(models.get($("model").value) || null);
  waiting.add("model:");
  show();
});
$("unlock").addEventListener("click", () => (operator.may ? operator.lock() : askUnlock(operator)));
$("rebalance").addEventListener("click", () => askRebalance(operator));
$("scale").addEventListener("click", () => askScale(operator, feed.items.get("groups").groups));
$("pin").addEventListener("click", () => {
  const hosts = [...feed.group("host:").keys()].sort((one, other) => one.localeCompare(other, "en", { numeric: true }));
  askPin(operator, "pin", chosenExpert(), hosts);
});
$("unpin").addEventListener("click", () => askPin(operator, "unpin", chosenExpert(), pinsOf(chosenExpert())));
$("replicate").addEventListener("click", () => {
  const { row, expert } = map.chosen;
  askReplicate(operator, chosenExpert(), Math.max(1, map.model.replicas[row * map.model.width + expert]));
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showLegend);

showOperator();
showMapState();

// What tests compare with `moesaic experts --json`.
window.moesaic = { feed, map, models, experts: (name) => everyExpert(models.get(name), feed.items.get("names") || []) };
