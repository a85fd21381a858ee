"use strict";
// Response browser: filters, list of prompts, responses to one prompt, keys.
//
// The data are prompts {id, subset, text, chosen, responses}; a response is
// {model, step, temperature, sample, text, tokens, finish, outcome, flags,
// calls}, a call {order, verdict, score, reply, error}; see browse.py.

const PROMPTS = JSON.parse(document.getElementById("data").textContent);
const ANY = "";
const OUTCOMES = {
  won: "won", lost: "lost", split: "orders disagree", tie: "tie",
  none: "no verdict",
};
const MARKS = {won: "W", lost: "L", split: "≠", tie: "=", none: "·"};
const VERDICTS = {
  model: "the response wins", chosen: "chosen wins", tie: "a tie",
  missing: "no verdict", refusal: "the judge refused",
};
const FINISH = {
  eos: "ended itself", turn: "began a human turn", length: "cut at the limit",
};

// --- filters

// Ratio of the lengths of response and chosen, in characters.
const LENGTHS = {
  shorter: ["shorter than chosen", (ratio) => ratio < 0.8],
  alike: ["about as long", (ratio) => ratio >= 0.8 && ratio <= 1.25],
  longer: ["longer than chosen", (ratio) => ratio > 1.25],
  twice: ["twice as long or more", (ratio) => ratio >= 2],
};

function turns(prompt) {
  return prompt.text.split("\n\nHuman:").length - 1;
}

// The prefix keeps names of subsets apart from the other keys.
const SUBSETS = new Map();
for (const name of [...new Set(PROMPTS.map((p) => p.subset))].sort()) {
  if (name) SUBSETS.set(`of ${name}`, [name, (p) => p.subset === name]);
}
SUBSETS.set("one turn", ["one turn", (p) => turns(p) < 2]);
SUBSETS.set("several turns", ["several turns", (p) => turns(p) > 1]);

function sameCell(filters, response) {
  return ["model", "step", "temperature"].every((name) =>
    filters[name] === ANY || String(response[name]) === filters[name]);
}

function matches(filters, prompt, response) {
  // Any response is longer than an empty chosen one.
  const ratio = response.text.length / Math.max(1, prompt.chosen.length);
  return sameCell(filters, response)
    && (filters.outcome === ANY || response.outcome === filters.outcome)
    && (filters.length === ANY || LENGTHS[filters.length][1](ratio))
    && (!filters.flagged || response.flags.length > 0);
}

// Lower-cased text of a prompt, its responses and the judge's replies, cached
// since a search runs at every key stroke.
const searchTexts = new Map();

function searchText(prompt) {
  if (!searchTexts.has(prompt)) {
    const parts = [prompt.text, prompt.chosen];
    for (const response of prompt.responses) {
      parts.push(response.text, ...response.calls.map((call) => call.reply));
    }
    searchTexts.set(prompt, parts.join("\n").toLowerCase());
  }
  return searchTexts.get(prompt);
}

// Prompts with at least one response that matches all filters.
function select(filters) {
  const words = filters.search.toLowerCase().split(/\s+/).filter(Boolean);
  const prompts = [];
  let responses = 0;
  for (const prompt of PROMPTS) {
    const subset = filters.subset;
    if (subset !== ANY && !SUBSETS.get(subset)[1](prompt)) continue;
    let count = 0;
    for (const response of prompt.responses) {
      if (matches(filters, prompt, response)) count += 1;
    }
    if (!count) continue;
    if (!words.every((word) => searchText(prompt).includes(word))) continue;
    prompts.push(prompt);
    responses += count;
  }
  return {prompts, responses};
}

// --- one prompt and its responses; text enters as text nodes, never as HTML

// Invisible and direction-changing characters are shown by code point, except
// line ends and the joiners of emoji and several scripts.
const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/u;
const SHOWN = new Set(["\n", "\t", "\u200c", "\u200d"]);

function element(tag, kind, ...children) {
  const node = document.createElement(tag);
  if (kind) node.className = kind;
  node.append(...children);
  return node;
}

function textBlock(text, kind) {
  const block = element("div", `text ${kind}`);
  block.dir = "auto";
  // trim() would remove more than spaces and line ends.
  text = text.replace(/\r\n?/g, "\n").replace(/^[ \n]+|[ \n]+$/g, "");
  if (!text) {
    block.append(element("span", "empty", "(empty)"));
    return block;
  }
  let plain = "";
  for (const character of text) {
    if (HIDDEN.test(character) && !SHOWN.has(character)) {
      const code = character.codePointAt(0).toString(16).toUpperCase();
      block.append(plain, element("span", "code", `U+${code.padStart(4, "0")}`));
      plain = "";
    } else {
      plain += character;
    }
  }
  block.append(plain);
  return block;
}

// The turns of a dialogue; a prompt of another form is one block.
function dialogue(text) {
  const box = element("div", "dialogue");
  const parts = text.split(/\n\n(Human|Assistant):/);
  if (parts[0].trim()) box.append(textBlock(parts[0], ""));
  for (let at = 1; at < parts.length; at += 2) {
    if (!parts[at + 1].trim()) continue;
    const turn = element("div", `turn ${parts[at].toLowerCase()}`);
    turn.append(element("span", "who", parts[at]));
    turn.append(textBlock(parts[at + 1], ""));
    box.append(turn);
  }
  return box;
}

function verdictLine(call) {
  const place = call.order === "model_first" ? "shown first" : "shown second";
  const line = element("li", "");
  line.append(element("b", "", VERDICTS[call.verdict]));
  line.append(` · response ${place}`);
  if (call.score !== null) {
    line.append(` · probability ${call.score.toFixed(2)}`);
  }
  if (call.reply.trim()) line.append(textBlock(call.reply, "judge"));
  if (call.error) line.append(textBlock(call.error, "error"));
  return line;
}

function responseCard(prompt, response) {
  const {step, sample, outcome, text} = response;
  const card = element("section", "card");
  if (!matches(state.filters, prompt, response)) card.classList.add("apart");
  const head = element("h4", "", response.model);
  if (step !== null) head.append(element("small", "", ` step ${step}`));
  if (sample) head.append(element("small", "", ` sample ${sample}`));
  head.append(element("span", `badge ${outcome}`, OUTCOMES[outcome]));
  card.append(head, textBlock(text, "response"));
  const facts = [`${text.length} characters`, `${response.tokens} tokens`,
    FINISH[response.finish]];
  card.append(element("p", "facts", facts.join(" · ")));
  for (const flag of response.flags) {
    card.append(element("p", "flag", `⚑ ${flag}`));
  }
  card.append(element("ul", "verdicts", ...response.calls.map(verdictLine)));
  return card;
}

// All responses to a prompt, by temperature: final models, then checkpoints.
function draw(prompt) {
  const place = `${state.current + 1} of ${state.prompts.length}`;
  const head = element("p", "facts", place);
  const link = element("a", "", prompt.id.slice(0, 12));
  link.href = `#prompt=${encodeURIComponent(prompt.id)}`;
  head.append(" · prompt ", link);
  if (prompt.subset) head.append(` · ${prompt.subset}`);
  const chosen = element("section", "card chosen");
  chosen.append(element("h4", "", "chosen"));
  chosen.append(textBlock(prompt.chosen, "response"));
  chosen.append(element("p", "facts", `${prompt.chosen.length} characters`));
  const parts = [head, element("h3", "", "Prompt"), dialogue(prompt.text),
    element("h3", "", "Responses"), chosen];
  const groups = new Map();
  for (const response of prompt.responses) {
    if (!sameCell(state.filters, response)) continue;
    const when = response.step === null ? "" : ", over training";
    const name = `T = ${response.temperature}${when}`;
    if (!groups.has(name)) groups.set(name, element("div", "cards"));
    groups.get(name).append(responseCard(prompt, response));
  }
  for (const [name, cards] of groups) {
    parts.push(element("h5", "", name), cards);
  }
  const detail = document.getElementById("detail");
  detail.replaceChildren(...parts);
  detail.scrollTop = 0;
}

// --- the list of prompts; only visible rows are in the document, so that many
// thousands are as fast as ten

const ROW = 60;   // height of a row in pixels, as in page.css
const SPARE = 6;  // rows drawn beyond the visible ones

const list = document.getElementById("list");
const rows = document.getElementById("rows");
const controls = {};
for (const name of ["search", "model", "step", "temperature", "outcome",
  "length", "subset", "flagged"]) {
  controls[name] = document.getElementById(name);
}
const state = {filters: null, prompts: [], current: 0};

function options(name, pairs) {
  const control = controls[name];
  control.replaceChildren(new Option("any", ANY),
    ...pairs.map(([value, text]) => new Option(text, value)));
  // A control without a choice is hidden.
  control.closest("label").hidden = pairs.length < 2;
}

function fillControls() {
  const values = (name) => [...new Set(PROMPTS.flatMap(
    (prompt) => prompt.responses.map((response) => response[name])))];
  const numbers = (name) => values(name).sort((a, b) => a - b);
  const kept = (pairs) => pairs.map(([key, [text]]) => [key, text]);
  options("model", values("model").map((name) => [name, name]));
  options("step", numbers("step").map((s) => [s, s === null ? "final" : s]));
  options("temperature", numbers("temperature").map((t) => [t, t]));
  options("outcome", Object.entries(OUTCOMES));
  options("length", kept(Object.entries(LENGTHS)));
  // Subsets of all or no prompts are no choice.
  options("subset", kept([...SUBSETS].filter(([, [, holds]]) =>
    PROMPTS.some(holds) && !PROMPTS.every(holds))));
}

// Applies the filters; keeps the current prompt if it is still listed.
function refresh() {
  const before = state.prompts[state.current];
  state.filters = {};
  for (const [name, control] of Object.entries(controls)) {
    state.filters[name] = name === "flagged" ? control.checked : control.value;
  }
  const {prompts, responses} = select(state.filters);
  state.prompts = prompts;
  document.getElementById("status").textContent = prompts.length
    ? `${prompts.length} of ${PROMPTS.length} prompts, ${responses} responses`
    : `none of ${PROMPTS.length} prompts: reset the filters with x`;
  rows.style.height = `${prompts.length * ROW}px`;
  go(Math.max(0, prompts.indexOf(before)));
}

// Selects a prompt, scrolls to it and draws its responses.
function go(index) {
  state.current = Math.max(0, Math.min(index, state.prompts.length - 1));
  const top = state.current * ROW;
  if (top < list.scrollTop) list.scrollTop = top;
  if (top + ROW > list.scrollTop + list.clientHeight) {
    list.scrollTop = top + ROW - list.clientHeight;
  }
  paint();
  const prompt = state.prompts[state.current];
  if (prompt) {
    draw(prompt);
  } else {
    document.getElementById("detail").replaceChildren(
      element("p", "facts", "No prompt has such a response."));
  }
}

function paint() {
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - SPARE);
  const last = Math.min(state.prompts.length,
    Math.ceil((list.scrollTop + list.clientHeight) / ROW) + SPARE);
  const visible = [];
  for (let index = first; index < last; index += 1) visible.push(listRow(index));
  rows.replaceChildren(...visible);
  list.setAttribute("aria-activedescendant", `row-${state.current}`);
}

function listRow(index) {
  const prompt = state.prompts[index];
  const row = element("div", "row");
  row.id = `row-${index}`;
  row.setAttribute("role", "option");
  row.setAttribute("aria-selected", String(index === state.current));
  row.dataset.index = String(index);
  row.style.top = `${index * ROW}px`;
  // The last human turn.
  const said = prompt.text.split("\n\nHuman:").pop().split("\n\nAssistant:")[0];
  const title = element("div", "said", said.trim().slice(0, 160) || "(empty)");
  title.dir = "auto";
  const marks = element("div", "marks");
  for (const response of prompt.responses.slice(0, 24)) {
    const apart = matches(state.filters, prompt, response) ? "" : " apart";
    const {outcome} = response;
    marks.append(element("span", `mark ${outcome}${apart}`, MARKS[outcome]));
  }
  if (prompt.responses.some((response) => response.flags.length)) {
    marks.append(element("span", "mark flag", "⚑"));
  }
  row.append(title, marks);
  return row;
}

// --- keys, clicks, theme

const help = document.getElementById("help");
const KEYS = [
  [["j", "ArrowDown"], "next prompt", () => go(state.current + 1)],
  [["k", "ArrowUp"], "previous prompt", () => go(state.current - 1)],
  [["g", "Home"], "first prompt", () => go(0)],
  [["G", "End"], "last prompt", () => go(state.prompts.length - 1)],
  [["/"], "search", () => controls.search.focus()],
  [["m"], "next model", () => cycle("model")],
  [["c"], "next temperature", () => cycle("temperature")],
  [["o"], "next outcome", () => cycle("outcome")],
  [["l"], "next length", () => cycle("length")],
  [["s"], "next subset", () => cycle("subset")],
  [["f"], "flagged only, or all", () => {
    controls.flagged.checked = !controls.flagged.checked;
    refresh();
  }],
  [["x"], "reset the filters", reset],
  [["t"], "light or dark", toggleTheme],
  [["?"], "these keys", () => help.showModal()],
];

function cycle(name) {
  const control = controls[name];
  control.selectedIndex = (control.selectedIndex + 1) % control.length;
  refresh();
}

function reset() {
  document.getElementById("filters").reset();
  refresh();
}

function toggleTheme() {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = root.dataset.theme || (dark ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
  for (const source of document.querySelectorAll("picture source")) {
    source.media = now === "dark" ? "not all" : "all";
  }
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
  const {target, key} = event;
  if (target.matches("input[type=search], select")) {
    // Letters go into the field; Escape leaves it.
    if (key === "Escape") list.focus();
    return;
  }
  // Arrows, Home and End scroll the page unless the list has the focus.
  const named = key.length > 1;
  if (named && !list.contains(target)) return;
  const found = KEYS.find(([keys]) => keys.includes(key));
  if (!found) return;
  event.preventDefault();
  found[2]();
}

function goToAddress() {
  const match = /^#prompt=(.+)$/.exec(location.hash);
  if (!match) return;
  let id = match[1];
  try { id = decodeURIComponent(id); } catch { return; }
  const index = state.prompts.findIndex((prompt) => prompt.id === id);
  if (index < 0) return;
  go(index);
  document.getElementById("browse").scrollIntoView();
}

function start() {
  fillControls();
  for (const [keys, text] of KEYS) {
    const shown = keys.map((key) => element("kbd", "",
      key.replace("Arrow", "")));
    const term = element("dt", "");
    term.append(...shown.flatMap((key, at) => (at ? [" ", key] : [key])));
    document.getElementById("keylist").append(term, element("dd", "", text));
  }
  let timer = 0;
  controls.search.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(refresh, 120);
  });
  for (const [name, control] of Object.entries(controls)) {
    if (name !== "search") control.addEventListener("change", refresh);
  }
  const on = (id, event, action) =>
    document.getElementById(id).addEventListener(event, action);
  on("filters", "submit", (event) => {
    event.preventDefault();
    list.focus();
  });
  on("clear", "click", reset);
  on("theme", "click", toggleTheme);
  on("keys", "click", () => help.showModal());
  list.addEventListener("scroll", paint, {passive: true});
  list.addEventListener("click", (event) => {
    const row = event.target.closest(".row");
    if (!row) return;
    go(Number(row.dataset.index));
    // On a phone the responses are below the list.
    if (matchMedia("(max-width: 800px)").matches) {
      document.getElementById("detail").scrollIntoView();
    }
  });
  addEventListener("resize", paint);
  addEventListener("hashchange", goToAddress);
  document.addEventListener("keydown", onKey);
  refresh();
  goToAddress();
}

start();
