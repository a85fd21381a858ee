// The list of prompts. Only the rows in sight are in the document, so that it
// is as quick for many thousands as for ten.

const ROW = 60;   // height of a row in pixels, as in the style sheet
const SPARE = 6;  // rows drawn beyond the edge

const list = document.getElementById("list");
const rows = document.getElementById("rows");
const controls = {};
for (const name of ["search", "model", "step", "temperature", "outcome",
  "length", "subset", "flagged"]) {
  controls[name] = document.getElementById(name);
}
const state = {asked: null, found: [], current: 0};

function options(control, pairs) {
  control.replaceChildren(...pairs.map(([value, text]) => new Option(text, value)));
  // What leaves no choice need not be shown.
  control.closest("label").hidden = pairs.length < 3;
}

function fill() {
  const unique = (at) => [...new Set(CELLS.map((cell) => cell[at]))];
  const numbers = (at) => unique(at).sort((a, b) => a - b);
  options(controls.model, [[ANY, "any"], ...unique(0).map((m) => [m, m])]);
  options(controls.step, [[ANY, "any"], ...numbers(1).map(
    (s) => [String(s), s === null ? "final" : String(s)])]);
  options(controls.temperature, [[ANY, "any"], ...numbers(2).map(
    (t) => [String(t), String(t)])]);
  options(controls.outcome, [[ANY, "any"], ...OUTCOMES.map((o) => [o, WORDS[o]])]);
  options(controls.length, [[ANY, "any"], ["shorter", "shorter than chosen"],
    ["alike", "about as long"], ["longer", "longer than chosen"],
    ["twice", "twice as long or more"]]);
  // What holds of all prompts tells none apart.
  const kinds = [...SUBSETS].filter(([, [, holds]]) =>
    PAGE.prompts.some(holds) && !PAGE.prompts.every(holds));
  options(controls.subset,
    [[ANY, "all"], ...kinds.map(([key, [text]]) => [key, text])]);
}

function read() {
  const asked = {};
  for (const [name, control] of Object.entries(controls)) {
    asked[name] = name === "flagged" ? control.checked : control.value;
  }
  return asked;
}

// Reads the controls again; stays at the same prompt if it is still there.
function refresh() {
  const before = state.found[state.current];
  state.asked = read();
  const {prompts, answers} = select(state.asked);
  state.found = prompts;
  const total = PAGE.prompts.length;
  document.getElementById("status").textContent = prompts.length
    ? `${prompts.length} of ${total} prompts, ${answers} answers`
    : `none of ${total} prompts: reset the filters with x`;
  rows.style.height = `${prompts.length * ROW}px`;
  go(Math.max(0, prompts.indexOf(before)));
}

// Makes a prompt the current one, in sight, and draws its answers.
function go(index) {
  state.current = Math.max(0, Math.min(index, state.found.length - 1));
  const top = state.current * ROW;
  if (top < list.scrollTop) list.scrollTop = top;
  if (top + ROW > list.scrollTop + list.clientHeight) {
    list.scrollTop = top + ROW - list.clientHeight;
  }
  paint();
  const prompt = state.found[state.current];
  if (prompt) {
    draw(prompt, `${state.current + 1} of ${state.found.length}`, state.asked);
  } else {
    document.getElementById("detail").replaceChildren(
      element("p", "facts", "No prompt has such an answer."));
  }
}

function paint() {
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - SPARE);
  const last = Math.min(state.found.length,
    Math.ceil((list.scrollTop + list.clientHeight) / ROW) + SPARE);
  const made = [];
  for (let index = first; index < last; index += 1) made.push(listRow(index));
  rows.replaceChildren(...made);
  list.setAttribute("aria-activedescendant", `row-${state.current}`);
}

function listRow(index) {
  const prompt = state.found[index];
  const row = element("div", "row");
  row.id = `row-${index}`;
  row.setAttribute("role", "option");
  row.setAttribute("aria-selected", String(index === state.current));
  row.dataset.index = String(index);
  row.style.top = `${index * ROW}px`;
  // The last thing a person said tells prompts apart.
  const said = prompt[2].split("\n\nHuman:").pop().split("\n\nAssistant:")[0];
  const title = element("div", "said", said.trim().slice(0, 160) || "(empty)");
  title.dir = "auto";
  const marks = element("div", "marks");
  for (const answer of prompt[4]) {
    const name = OUTCOMES[answer[5]];
    const apart = matchesAnswer(state.asked, prompt, answer) ? "" : " apart";
    marks.append(element("span", `mark ${name}${apart}`, MARKS[name]));
    if (marks.childElementCount >= 24) break;
  }
  if (prompt[4].some((answer) => answer[6].length)) {
    marks.append(element("span", "mark flag", "⚑"));
  }
  row.append(title, marks);
  return row;
}
