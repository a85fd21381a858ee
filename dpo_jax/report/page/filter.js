"use strict";
// What the page holds, and which of it is asked for. Nothing here draws.
//
// A prompt is [id, turns, text, chosen, answers, subset]; an answer [cell,
// sample, text, tokens, finish, outcome, flags, calls]; a call [order, verdict,
// score, text, error]; a cell [model, step, temperature].

const PAGE = JSON.parse(document.getElementById("data").textContent);
const CELLS = PAGE.head.cells;
const OUTCOMES = PAGE.head.outcomes;
const ANY = "";

// How long an answer is beside the chosen one, in characters.
const LENGTHS = {
  "shorter": (ratio) => ratio < 0.8,
  "alike": (ratio) => ratio >= 0.8 && ratio <= 1.25,
  "longer": (ratio) => ratio > 1.25,
  "twice": (ratio) => ratio >= 2,
};

// Prompts by the part of the dataset that they are of, and by their turns. The
// keys of the first are foreign text, apart from those of the second.
const SUBSETS = new Map();
for (const name of [...new Set(PAGE.prompts.map((p) => p[5]))].sort()) {
  if (name) SUBSETS.set(`of ${name}`, [name, (p) => p[5] === name]);
}
SUBSETS.set("one turn", ["one turn", (p) => p[1] === 1]);
SUBSETS.set("several turns", ["several turns", (p) => p[1] > 1]);

function lengthRatio(prompt, answer) {
  // An empty chosen answer makes every other one longer.
  return answer[2].length / Math.max(1, prompt[3].length);
}

// Lower-cased texts to search, made when they are first asked for.
const searched = new Map();

function searchText(prompt) {
  let text = searched.get(prompt);
  if (text === undefined) {
    const parts = [prompt[2], prompt[3]];
    for (const answer of prompt[4]) {
      parts.push(answer[2]);
      for (const call of answer[7]) parts.push(call[3]);
    }
    text = parts.join("\n").toLowerCase();
    searched.set(prompt, text);
  }
  return text;
}

function matchesAnswer(asked, prompt, answer) {
  const cell = CELLS[answer[0]];
  return (asked.model === ANY || cell[0] === asked.model)
    && (asked.step === ANY || String(cell[1]) === asked.step)
    && (asked.temperature === ANY || String(cell[2]) === asked.temperature)
    && (asked.outcome === ANY || OUTCOMES[answer[5]] === asked.outcome)
    && (asked.length === ANY
      || LENGTHS[asked.length](lengthRatio(prompt, answer)))
    && (!asked.flagged || answer[6].length > 0);
}

// The prompts that have an answer of which all is true that is asked.
function select(asked) {
  const words = asked.search.toLowerCase().split(/\s+/).filter(Boolean);
  const found = [];
  let answers = 0;
  for (const prompt of PAGE.prompts) {
    if (asked.subset !== ANY && !SUBSETS.get(asked.subset)[1](prompt)) continue;
    let count = 0;
    for (const answer of prompt[4]) {
      if (matchesAnswer(asked, prompt, answer)) count += 1;
    }
    if (!count) continue;
    if (words.length) {
      const text = searchText(prompt);
      if (!words.every((word) => text.includes(word))) continue;
    }
    found.push(prompt);
    answers += count;
  }
  return {prompts: found, answers};
}
