// The panels beside the heat map. Each function brings one panel to what the items say.

import { bytes, make, many, number, percent, rough, rows, say, seconds, time } from "./words.js";

const $ = (id) => document.getElementById(id);
const SHOWN_EVENTS = 120;

// ---- hosts ----------------------------------------------------------------------------------------

function hostRow() {
  const bar = () => make("span", "meter", make("i"));
  const row = make("tr", "", make("th"), make("td"), make("td", "n"), make("td"), make("td"), make("td", "n"), make("td", "n"), make("td", "n"), make("td"));
  row.children[0].scope = "row";
  row.children[1].append(make("span", "dot"), make("span"));
  row.children[3].append(bar(), make("span", "beside"));
  row.children[4].append(bar(), make("span", "beside"));
  const button = make("button", "small");
  button.type = "button";
  row.children[8].append(button);
  return row;
}

function meter(cell, part, words) {
  cell.firstChild.firstChild.style.width = `${100 * Math.max(0, Math.min(1, part || 0))}%`;
  say(cell.lastChild, words);
}

function level(host) {
  if (host.state === "up") return host.draining ? "warm" : "good";
  return host.state === "loading" || host.state === "starting" ? "warm" : "bad";
}

export function showHosts(feed, obstacles, may, ask) {
  const hosts = [...feed.group("host:")].sort(([one], [other]) => one.localeCompare(other, "en", { numeric: true }));
  const wanted = hosts.map(([name, host]) => [name, (row) => fillHost(row, name, host, obstacles, may)]);
  rows($("hosts"), wanted, () => {
    const row = hostRow();
    const button = row.children[8].firstChild;
    button.addEventListener("click", () => ask(button.dataset.action, row.dataset.key));
    return row;
  });
  const up = hosts.filter(([, host]) => host.state === "up" && !host.draining).length;
  say($("f-hosts"), hosts.length ? `${up} / ${hosts.length}` : "–");
  const held = hosts.reduce((sum, [, host]) => sum + (host.process ? host.process.replicas : 0), 0);
  say($("n-hosts"), hosts.length ? `hold ${many(held, "replica")}` : "");
  say($("hosts-note"), hosts.length ? "" : "no host has reported yet");
}

function fillHost(row, name, host, obstacles, may) {
  const cells = row.children;
  const process = host.process;
  say(cells[0], name);
  cells[0].title = process ? `${process.device}, process ${process.incarnation} of this host` : "";
  cells[1].firstChild.className = `dot ${level(host)}`;
  const state = host.draining && host.state === "up" ? "draining" : host.state.replaceAll("_", " ");
  const why = obstacles[name] || host.error;
  say(cells[1].lastChild, state + (why ? " !" : ""));
  cells[1].title = why || "";
  const loading = process && process.loading ? ` +${process.loading}` : "";
  say(cells[2], process ? number(process.replicas) + loading : "–");
  const room = host.room_bytes || (process && process.machine_bytes) || 0;
  const used = process ? process.weight_bytes : 0;
  if (host.slots) meter(cells[3], process ? process.replicas / host.slots : 0, process ? bytes(used) : "–");
  else meter(cells[3], room ? used / room : 0, process ? bytes(used) : "–");
  cells[3].title = host.slots ? `${host.slots} slots` : room ? `of ${bytes(room)}` : "";
  const rates = process && host.rates;
  meter(cells[4], rates ? rates[2] : 0, rates ? percent(rates[2]) : "–");
  say(cells[5], rates ? rough(rates[1]) : "–");
  say(cells[6], process ? rough(process.queued_rows) : "–");
  const [lent, paths] = host.lent;
  say(cells[7], paths ? percent(lent / paths) : "–");
  cells[7].title = paths ? `${lent} of ${many(paths, "router")} compute with its memory` : "no router is connected";
  const button = cells[8].firstChild;
  const action = host.draining ? "undrain" : "drain";
  button.dataset.action = action;
  say(button, host.draining ? "Undrain…" : "Drain…");
  button.setAttribute("aria-label", `${action} ${name}`);
  button.disabled = !may;
}

// ---- figures --------------------------------------------------------------------------------------

export function showFigures(feed, models, curves) {
  const health = feed.items.get("health");
  const total = [...models.values()].reduce((sum, model) => sum + model.total, 0);
  say($("f-load"), models.size ? rough(total) : "–");
  curves.load.add(total);
  const endpoint = feed.items.get("own:endpoint");
  say($("f-requests"), endpoint ? number(endpoint.running) : "–");
  curves.requests.add(endpoint ? endpoint.running : null);
  if (!health) return;
  say($("f-even"), health.mean === null ? "no load" : health.mean.toFixed(3));
  curves.even.add(health.mean);
  say($("f-moves"), number(health.pending));
  say($("n-moves"), health.automatic ? "balances by itself" : "balances when asked");
  say($("f-missing"), number(health.missing));
  $("f-missing").classList.toggle("alarm", health.missing > 0);
  say($("n-missing"), health.unprotected ? `${rough(health.unprotected)} have one replica` : "each has two replicas");
}

// ---- moves and the timeline -----------------------------------------------------------------------

export function showMoves(feed) {
  const moves = feed.items.get("moves") || [];
  const changes = feed.items.get("changes") || [];
  const health = feed.items.get("health");
  const last = changes.at(-1);
  const bar = $("moves-bar");
  const pending = health ? health.pending : 0;
  if (last && last.phase === "loading") {
    const total = Math.max(1, last.total_moves);
    bar.value = Math.max(0, total - last.pending_moves) / total;
  } else bar.value = pending ? 0 : 1;
  bar.classList.toggle("idle", !pending);
  if (!pending) say($("moves-words"), "no replica moves");
  else {
    const some = moves.slice(0, 3).map(([, layer, expert, host]) => `${layer}/${expert} → ${host}`);
    say($("moves-words"), `${many(pending, "replica")} to load: ${some.join(", ")}${pending > some.length ? ", …" : ""}`);
  }
}

function changeWords(one) {
  const moves = many(one.total_moves, "replica");
  const before = one.balancedness_before;
  const after = one.balancedness_predicted;
  const effect = before && after ? `, ${before.mean.toFixed(2)} → ${after.mean.toFixed(2)}` : "";
  const measured = one.measured ? `, measured ${one.measured[1].toFixed(2)}` : "";
  const took = one.ended === null ? "" : ` after ${seconds(Math.max(0, one.ended - one.began))}`;
  const failed = one.errors.length ? `: ${one.errors[0]}` : "";
  return `change ${one.id} by ${one.initiator}, ${one.reason}: ${moves}${effect}; ${one.phase.replaceAll("_", " ")}${took}${measured}${failed}`;
}

function scalingWords(one) {
  const awaited = one.awaited.length ? `, waits for ${one.awaited.slice(0, 3).join(", ")}` : "";
  return `group ${one.group} by ${one.initiator}, ${one.reason}: ${one.before} → ${many(one.target, "host")}; ${one.phase.replaceAll("_", " ")}${awaited}`;
}

const CHANGE_LEVEL = { loading: "warm", done: "good", failed: "bad" };
const SCALING_LEVEL = { starting: "warm", draining: "warm", done: "good", no_room: "bad" };

export function showEvents(feed) {
  const all = [];
  for (const one of feed.items.get("changes") || []) {
    all.push([one.began, `c${one.id}`, CHANGE_LEVEL[one.phase] || "plain", changeWords(one)]);
  }
  for (const one of feed.items.get("scalings") || []) {
    all.push([one.began, `s${one.id}`, SCALING_LEVEL[one.phase] || "plain", scalingWords(one)]);
  }
  for (const one of feed.items.get("events") || []) {
    const words = one.host ? `${one.host} ${one.what}` : one.what;
    all.push([one.at, `e${one.at}${words}`, one.level, words]);
  }
  all.sort((one, other) => other[0] - one[0]);
  const wanted = all.slice(0, SHOWN_EVENTS).map(([at, key, kind, words]) => [
    key,
    (row) => {
      say(row.children[0], time(at));
      row.children[1].className = `dot ${kind}`;
      say(row.children[2], words);
    },
  ]);
  rows($("events"), wanted, () => make("li", "", make("time"), make("span", "dot"), make("span", "what")));
  say($("events-note"), all.length ? "" : "nothing has happened yet");
}

// ---- the hottest experts, which are the map in words ----------------------------------------------

export function showHottest(model, names, choose) {
  const best = model ? model.hottest(20) : [];
  const wanted = best.map((cell, place) => [
    String(place),
    (row) => {
      const at = Math.floor(cell / model.width);
      const expert = cell - at * model.width;
      row.dataset.row = at;
      row.dataset.expert = expert;
      say(row.children[0], String(model.layers[at]));
      say(row.children[1].firstChild, String(expert));
      row.children[1].firstChild.setAttribute("aria-label", `expert ${expert} of layer ${model.layers[at]}`);
      say(row.children[2], number(model.load[cell]));
      say(row.children[3], percent(model.load[cell] / model.sums[at], 1));
      const hosts = model.hosts(at, expert, names).map(([host]) => host);
      say(row.children[4], hosts.slice(0, 4).join(", ") + (hosts.length > 4 ? ` +${hosts.length - 4}` : ""));
    },
  ]);
  rows($("hottest"), wanted, () => {
    const button = make("button", "plain");
    button.type = "button";
    const row = make("tr", "", make("td", "n"), make("td", "n", button), make("td", "n"), make("td", "n"), make("td", "hosts-of"));
    button.addEventListener("click", () => choose(Number(row.dataset.row), Number(row.dataset.expert)));
    return row;
  });
}

// ---- requests and training ------------------------------------------------------------------------

const seenSteps = new Map();

export function showEngines(feed) {
  const engines = feed.items.get("own:engines") || {};
  const now = performance.now() / 1000;
  const wanted = Object.entries(engines).map(([name, engine]) => [
    name,
    (row) => {
      const work = engine.work;
      const words = engine.healthy ? "" : engine.last_error || "not healthy";
      say(row.children[0].lastChild, name);
      row.children[0].firstChild.className = `dot ${engine.healthy ? "good" : "bad"}`;
      row.children[0].title = words;
      const pace = work ? stepsPerS(name, work.steps, now) : null;
      const values = work
        ? [number(work.running_requests), number(work.waiting_requests), number(work.parked_requests), pace === null ? "–" : number(pace), percent(work.free_cache_fraction)]
        : ["–", "–", "–", "–", engine.starts_on_demand ? "asleep" : "–"];
      values.forEach((value, i) => say(row.children[i + 1], value));
    },
  ]);
  rows($("engines"), wanted, () =>
    make("tr", "", make("th", "", make("span", "dot"), make("span")), ...Array.from({ length: 5 }, () => make("td", "n"))));
  for (const row of $("engines").children) row.firstElementChild.scope = "row";
  const endpoint = feed.items.get("own:endpoint");
  say($("requests-note"), endpoint && endpoint.ending ? "the endpoint refuses new requests: it ends" : "");
}

function stepsPerS(name, steps, now) {
  const seen = seenSteps.get(name) || [];
  if (seen.length && seen.at(-1)[1] > steps) seen.length = 0;
  if (!seen.length || now - seen.at(-1)[0] > 0.9) seen.push([now, steps]);
  while (seen.length > 1 && now - seen[0][0] > 10) seen.shift();
  seenSteps.set(name, seen);
  const [from, to] = [seen[0], seen.at(-1)];
  return to[0] > from[0] ? (to[1] - from[1]) / (to[0] - from[0]) : null;
}

let trainedRun = null;
let trainedSteps = [];

export function showTraining(feed, models, curves) {
  const run = feed.items.get("training");
  document.body.toggleAttribute("data-training", Boolean(run));
  if (!run) {
    say($("training-words"), "no run trains a model");
    say($("training-note"), "");
    return;
  }
  if (trainedRun !== run.run) {
    trainedRun = run.run;
    trainedSteps = [];
    for (const curve of [curves.steps, curves.pace, curves.work]) curve.clear();
  }
  const now = performance.now() / 1000;
  trainedSteps.push([now, run.steps]);
  while (trainedSteps.length > 1 && now - trainedSteps[0][0] > 30) trainedSteps.shift();
  const [from, to] = [trainedSteps[0], trainedSteps.at(-1)];
  const pace = to[0] - from[0] > 2 ? (60 * (to[1] - from[1])) / (to[0] - from[0]) : null;
  curves.steps.add(run.steps);
  curves.pace.add(pace);
  curves.work.add(models.has(run.model) ? models.get(run.model).total : null);
  const owned = Object.values(run.owned_tensors).reduce((sum, one) => sum + one, 0);
  say($("training-words"), `run ${run.run} of ${run.initiator} trains ${run.model}: ${many(run.steps, "step")}, version ${run.version} is served, ${many(owned, "owned tensor")} on ${many(Object.keys(run.owned_tensors).length, "host")}`);
  $("training-words").title = Object.entries(run.owned_tensors)
    .map(([host, count]) => `${host} owns ${many(count, "tensor")}, ${bytes(run.owned_bytes?.[host] ?? 0)}`).join("\n");
  const notes = pace === null ? [] : [`${number(pace)} steps / min`];
  if (run.step_s) notes.push(`${number(run.step_s)} s a step`);
  if (run.tokens_per_s) notes.push(`${number(run.tokens_per_s)} tokens / s`);
  if (run.balancedness) notes.push(`balancedness ${run.balancedness.mean.toFixed(2)}`);
  if (run.attempt) notes.push(`attempt ${run.attempt} by ${many(run.workers, "worker")}`);
  if (run.unprotected_tensors) notes.push(`${many(run.unprotected_tensors, "tensor")} with a single owner`);
  say($("training-note"), notes.join(", "));
}
