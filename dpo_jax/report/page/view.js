// Draws one prompt with its answers. Texts enter as text nodes, never as HTML.

// Characters that are invisible or move their neighbours are shown by name,
// but for line ends and the joiners that emoji and several scripts need.
const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/u;
const SHOWN = new Set(["\n", "\t", "\u200c", "\u200d"]);
const WORDS = {
  won: "won", lost: "lost", split: "orders disagree", tie: "tie",
  none: "no verdict",
};
const MARKS = {won: "W", lost: "L", split: "≠", tie: "=", none: "·"};
const SAID = {
  model: "the answer wins", chosen: "chosen wins", tie: "a tie",
  missing: "no verdict", refusal: "the judge refused",
};
const ENDS = {
  eos: "ended itself", turn: "began a human turn", length: "cut at the limit",
};

function element(tag, kind, ...children) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  made.append(...children);
  return made;
}

function textBlock(text, kind) {
  const block = element("div", `text ${kind}`);
  block.dir = "auto";
  // Spaces and line ends alone: trim() would hide more than it shows.
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

// A dialogue by its turns; a prompt of another form is one block.
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
  const [order, verdict, score, text, error] = call;
  const place = order === "model_first" ? "shown first" : "shown second";
  const line = element("li", `said-${verdict}`);
  line.append(element("b", "", SAID[verdict] || verdict));
  line.append(` · answer ${place}`);
  if (score !== null) line.append(` · probability ${score.toFixed(2)}`);
  if (text.trim()) line.append(textBlock(text, "judge"));
  if (error) line.append(textBlock(error, "error"));
  return line;
}

function answerCard(prompt, answer, matched) {
  const [cell, sample, text, tokens, finish, outcome, flags, calls] = answer;
  const [model, step] = CELLS[cell];
  const name = OUTCOMES[outcome];
  const card = element("section", `card outcome-${name}`);
  if (!matched) card.classList.add("apart");
  const head = element("h4", "", model);
  if (step !== null) head.append(element("small", "", ` step ${step}`));
  if (sample) head.append(element("small", "", ` sample ${sample}`));
  head.append(element("span", `badge ${name}`, WORDS[name]));
  card.append(head, textBlock(text, "answer"));
  const facts = [`${text.length} characters`, `${tokens} tokens`, ENDS[finish]];
  card.append(element("p", "facts", facts.join(" · ")));
  for (const flag of flags) card.append(element("p", "flag", `⚑ ${flag}`));
  const list = element("ul", "verdicts");
  for (const call of calls) list.append(verdictLine(call));
  card.append(list);
  return card;
}

// All answers to a prompt: final models by temperature, then checkpoints.
function draw(prompt, place, asked) {
  const [id, , text, chosen, answers, subset] = prompt;
  const head = element("p", "facts", `${place}`);
  const link = element("a", "", id.slice(0, 12));
  link.href = `#prompt=${encodeURIComponent(id)}`;
  head.append(" · prompt ", link);
  if (subset) head.append(` · ${subset}`);
  const parts = [head, element("h3", "", "Prompt"), dialogue(text)];
  const reference = element("section", "card chosen");
  reference.append(element("h4", "", "chosen"), textBlock(chosen, "answer"));
  reference.append(element("p", "facts", `${chosen.length} characters`));
  parts.push(element("h3", "", "Answers"), reference);
  const groups = new Map();
  for (const answer of answers) {
    const [model, step, temperature] = CELLS[answer[0]];
    const wanted = (asked.model === ANY || model === asked.model)
      && (asked.step === ANY || String(step) === asked.step)
      && (asked.temperature === ANY || String(temperature) === asked.temperature);
    if (!wanted) continue;
    const when = step === null ? "" : ", over training";
    const name = `T = ${temperature}${when}`;
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(answer);
  }
  for (const [name, group] of groups) {
    const row = element("div", "cards");
    for (const answer of group) {
      row.append(answerCard(prompt, answer, matchesAnswer(asked, prompt, answer)));
    }
    parts.push(element("h5", "", name), row);
  }
  const detail = document.getElementById("detail");
  detail.replaceChildren(...parts);
  detail.scrollTop = 0;
}
