// What operators do: each action asks first, and shows its key to the server alone.

import { bytes, make, many, number, say, seconds } from "./words.js";

const KEPT = "moesaic-operator-key";
const $ = (id) => document.getElementById(id);

/** The operator key, from the fragment of the address, which no browser sends. */
export class Operator {
  constructor(onChange) {
    this.may = false;
    this.words = "read-only";
    this._onChange = onChange;
    const given = new URLSearchParams(location.hash.slice(1)).get("key");
    if (given) {
      sessionStorage.setItem(KEPT, given);
      history.replaceState(null, "", location.pathname + location.search);
    }
    if (sessionStorage.getItem(KEPT)) this.check();
  }

  /** Keep another key and ask the server whether it is right. */
  async unlock(key) {
    sessionStorage.setItem(KEPT, key.trim());
    return this.check();
  }

  lock() {
    sessionStorage.removeItem(KEPT);
    this._set(false, "read-only");
  }

  async check() {
    try {
      await this.post("check", {});
      this._set(true, "operator");
      return "";
    } catch (error) {
      if (error.status === 401) this.lock();
      this._set(false, error.status === 401 ? "read-only: wrong key" : "read-only");
      return error.message;
    }
  }

  async post(action, fields) {
    const answer = await fetch(`actions/${action}`, {
      method: "POST",
      headers: {
        "Content-Type": "application/json",
        Authorization: `Bearer ${sessionStorage.getItem(KEPT) || ""}`,
      },
      body: JSON.stringify(fields),
      credentials: "omit",
      cache: "no-store",
    });
    if (answer.status === 204) return null;
    const told = await answer.json().catch(() => null);
    if (answer.ok) return told;
    const words = told && told.error ? told.error.message : `the server answered ${answer.status}`;
    throw Object.assign(new Error(words), { status: answer.status });
  }

  _set(may, words) {
    this.may = may;
    this.words = words;
    this._onChange();
  }
}

// ---- the dialog -----------------------------------------------------------------------------------

/** Ask, and call `act(values)` on consent; an error stays in the dialog, in the server's words. */
function ask(title, body, yes, act) {
  const dialog = $("ask");
  say($("ask-title"), title);
  $("ask-body").replaceChildren(...body);
  say($("ask-yes"), yes);
  $("ask-problem").hidden = true;
  $("ask-yes").disabled = false;
  $("ask-yes").hidden = !yes;
  $("ask-no").onclick = () => dialog.close();
  $("ask-yes").onclick = async () => {
    const inputs = [...dialog.querySelectorAll("input, select")];
    const wrong = inputs.find((input) => !input.checkValidity());
    if (wrong) {
      problem(`${wrong.dataset.name}: ${wrong.validationMessage}`);
      wrong.focus();
      return;
    }
    $("ask-yes").disabled = true;
    try {
      await act(Object.fromEntries(inputs.map((input) => [input.name, input.value])));
      dialog.close();
    } catch (error) {
      problem(error.message || String(error));
    } finally {
      $("ask-yes").disabled = false;
    }
  };
  if (!dialog.open) dialog.showModal();
  (dialog.querySelector("input, select") || $("ask-no")).focus();
}

function problem(words) {
  say($("ask-problem"), words);
  $("ask-problem").hidden = false;
}

function field(name, words, type, value, more = {}) {
  const input = type === "select" ? make("select") : make("input");
  if (type === "select") for (const one of value) input.append(make("option", "", one));
  else Object.assign(input, { type, value, required: true, autocomplete: "off" }, more);
  input.name = name;
  input.dataset.name = words;
  return make("label", "field", make("span", "", words), input);
}

let fading = 0;
function done(words) {
  say($("said"), words);
  $("said").classList.add("there");
  clearTimeout(fading);
  fading = setTimeout(() => $("said").classList.remove("there"), 6000);
}

function begun(change) {
  const trouble = change.errors.length ? `; ${change.errors[0]}` : "";
  done(`change ${change.id} has begun: ${many(change.total_moves, "replica")} to load${trouble}`);
}

// ---- the actions ----------------------------------------------------------------------------------

export function askUnlock(operator) {
  const hint = make("p", "", "The operator key is printed by ", make("code", "", "moesaic page --print"), " on the machine that started the cluster. It stays in this tab, and is sent with actions alone.");
  ask("Unlock the actions", [hint, field("key", "operator key", "password", "")], "Unlock", async ({ key }) => {
    const wrong = await operator.unlock(key);
    if (wrong) throw new Error(wrong);
  });
}

export function askHost(operator, action, host, feed) {
  const held = feed.items.get(`host:${host}`)?.process?.replicas ?? 0;
  const words = action === "drain"
    ? `All ${many(held, "replica")} of ${host} move to other hosts, and requests go on. The host stays empty until it is undrained.`
    : `${host} may hold experts again. The next plan gives it some.`;
  ask(`${action === "drain" ? "Drain" : "Undrain"} ${host}?`, [make("p", "", words)], action === "drain" ? "Drain" : "Undrain", async () => begun(await operator.post(action, { host })));
}

export async function askRebalance(operator) {
  ask("Rebalance", [make("p", "", "The planner looks for better places…")], "", async () => {});
  try {
    showPlan(operator, await operator.post("plan", {}));
  } catch (error) {
    if ($("ask").open) problem(error.message);
  }
}

function showPlan(operator, plan) {
  if (!$("ask").open) return;
  const before = plan.balancedness_before;
  const after = plan.balancedness_after;
  if (!before || !plan.moves.length) {
    ask("Rebalance", [make("p", "", before ? "There is nothing to move: no plan is better than the placement." : "The cluster serves no model.")], "", async () => {});
    return;
  }
  const fact = (name, words) => make("div", "", make("dt", "", name), make("dd", "", words));
  const facts = make("dl", "facts",
    fact("moves", `${many(plan.moves.length, "replica")}, ${bytes(plan.weight_bytes)}, about ${seconds(plan.expected_s)}`),
    fact("leave", many(plan.drops.length, "replica")),
    fact("balancedness", `mean ${before.mean.toFixed(3)} → ${after.mean.toFixed(3)}, worst layer ${before.worst.toFixed(3)} → ${after.worst.toFixed(3)}`),
    fact("with one replica", `${many(plan.unprotected_experts_before, "expert")} → ${number(plan.unprotected_experts_after)}`));
  const body = make("tbody");
  for (const move of plan.moves.slice(0, 200)) {
    body.append(make("tr", "", make("td", "n", String(move.layer)), make("td", "n", String(move.expert)), make("td", "", move.host), make("td", "", `${move.kind}: ${move.reason}`)));
  }
  const heads = [["n", "layer"], ["n", "expert"], ["", "to"], ["", "why"]].map(([kind, words]) => Object.assign(make("th", kind, words), { scope: "col" }));
  const list = make("div", "scroll", make("table", "", make("thead", "", make("tr", "", ...heads)), body));
  list.tabIndex = 0;
  list.setAttribute("role", "region");
  list.setAttribute("aria-label", "Replicas that move");
  const note = make("p", "note", "The plan is made afresh for the load of the moment at which you consent.");
  ask("Carry out this plan?", [facts, list, note], "Rebalance", async () => begun(await operator.post("rebalance", {})));
}

export function askPin(operator, action, { model, layer, expert }, hosts) {
  const what = action === "pin"
    ? "A replica of this expert is loaded there, and stays until it is unpinned."
    : "The replica may leave that host again.";
  const title = `${action === "pin" ? "Pin" : "Unpin"} expert ${expert} of layer ${layer}`;
  ask(title, [make("p", "", what), field("host", "host", "select", hosts)], action === "pin" ? "Pin" : "Unpin", async ({ host }) => begun(await operator.post(action, { model, layer, expert, host })));
}

export function askReplicate(operator, { model, layer, expert }, count) {
  const words = make("p", "", "The expert has at least so many replicas from now on; 1 takes the wish back.");
  ask(`Replicas of expert ${expert} of layer ${layer}`, [words, field("replicas", "replicas", "number", String(count), { min: 1, max: 10000, step: 1 })], "Replicate", async ({ replicas }) => begun(await operator.post("replicate", { model, layer, expert, replicas: Number(replicas) })));
}

export function askScale(operator, groups) {
  const told = groups.map((group, i) => make("p", "note", `group ${i}: ${many(group.hosts, "host")} now, ${group.min_hosts} to ${group.max_hosts}`));
  const words = make("p", "", "Hosts that leave are drained first; hosts that come wait for a machine.");
  const count = field("hosts", "hosts", "number", String(groups[0].hosts), { min: 1, max: 100000, step: 1 });
  const group = field("group", "group", "select", groups.map((_, i) => String(i)));
  group.lastChild.addEventListener("change", () => (count.lastChild.value = groups[group.lastChild.value].hosts));
  ask("Scale a group of hosts", [words, ...told, group, count], "Scale", async (values) => {
    const done_ = await operator.post("scale", { group: Number(values.group), hosts: Number(values.hosts) });
    done(`group ${done_.group}: ${done_.hosts_before} → ${many(done_.target_hosts, "host")}, ${done_.phase.replaceAll("_", " ")}`);
  });
}
