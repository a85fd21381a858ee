// Keys, clicks, light and dark; and the start of it all.

const help = document.getElementById("help");
const KEYS = [
  [["j", "ArrowDown"], "next prompt", () => go(state.current + 1)],
  [["k", "ArrowUp"], "previous prompt", () => go(state.current - 1)],
  [["g", "Home"], "first prompt", () => go(0)],
  [["G", "End"], "last prompt", () => go(state.found.length - 1)],
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
    // Typing is typing; Escape gives the keys back.
    if (key === "Escape") list.focus();
    return;
  }
  // Arrows, Home and End scroll the page unless the list is in use.
  const named = key.length > 1;
  if (named && !list.contains(target)) return;
  const found = KEYS.find(([keys]) => keys.includes(key));
  if (!found) return;
  event.preventDefault();
  found[2]();
}

function fromAddress() {
  const match = /^#prompt=(.+)$/.exec(location.hash);
  if (!match) return;
  let id = match[1];
  try { id = decodeURIComponent(id); } catch { return; }
  const index = state.found.findIndex((prompt) => prompt[0] === id);
  if (index < 0) return;
  go(index);
  document.getElementById("browse").scrollIntoView();
}

function start() {
  fill();
  for (const [keys, text] of KEYS) {
    const shown = keys.map((key) => element("kbd", "",
      key.replace("Arrow", "")));
    const term = element("dt", "");
    term.append(...shown.flatMap((key, at) => (at ? [" ", key] : [key])));
    document.getElementById("keylist").append(term, element("dd", "", text));
  }
  let waiting = 0;
  controls.search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(refresh, 120);
  });
  for (const [name, control] of Object.entries(controls)) {
    if (name !== "search") control.addEventListener("change", refresh);
  }
  document.getElementById("filters").addEventListener("submit", (event) => {
    event.preventDefault();
    list.focus();
  });
  document.getElementById("clear").addEventListener("click", reset);
  document.getElementById("theme").addEventListener("click", toggleTheme);
  document.getElementById("keys").addEventListener("click",
    () => help.showModal());
  list.addEventListener("scroll", paint, {passive: true});
  list.addEventListener("click", (event) => {
    const row = event.target.closest(".row");
    if (!row) return;
    go(Number(row.dataset.index));
    // On a phone the answers stand below the list.
    if (matchMedia("(max-width: 800px)").matches) {
      document.getElementById("detail").scrollIntoView();
    }
  });
  addEventListener("resize", paint);
  addEventListener("hashchange", fromAddress);
  document.addEventListener("keydown", onKey);
  refresh();
  fromAddress();
}

start();
