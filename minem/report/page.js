// The report's script (minem/report/page.py): the theme, and two filtered lists.
// Texts come from models and strangers' files, so they are set as textContent only.
"use strict";

const PAGE = 20;
const data = JSON.parse(document.getElementById("data").textContent);

function objects(table) {
  return table.rows.map((row) => Object.fromEntries(table.columns.map((name, i) => [name, row[i]])));
}

function element(tag, text, name) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}

function distinct(rows, key) {
  return [...new Set(rows.map((row) => row[key]))].sort((a, b) => (a > b) - (a < b));
}

// A section with filters: its selects offer what the rows have, its inputs search; `card` draws one row.
function browse(section, rows, total, what, texts, card) {
  const form = section.querySelector(".filters");
  const [before, after] = section.querySelectorAll(".pages button");
  let found = rows;
  let start = 0;

  for (const select of form.querySelectorAll("select")) {
    select.append(new Option("all", ""));
    for (const value of distinct(rows, select.name)) {
      select.append(new Option(select.name === "run" ? data.runs[value] : value, String(value)));
    }
    select.parentElement.hidden = select.options.length < 3 && select.name === "run";
  }

  function show() {
    const end = Math.min(start + PAGE, found.length);
    const counts = [`${found.length.toLocaleString("en")} ${what} match`];
    if (found.length > PAGE) counts.push(`${start + 1} to ${end} are shown`);
    if (rows.length < total) {
      counts.push(`this file holds ${rows.length.toLocaleString("en")} of ${total.toLocaleString("en")}`);
    }
    section.querySelector(".count").textContent = counts.join(" · ");
    section.querySelector(".rows").replaceChildren(...found.slice(start, end).map(card));
    before.disabled = start === 0;
    after.disabled = end === found.length;
    before.parentElement.hidden = found.length <= PAGE;
  }

  function filter() {
    const wanted = Object.fromEntries(new FormData(form));
    const text = (wanted.text || "").toLowerCase();
    const id = (wanted.id || "").trim().toLowerCase();
    found = rows.filter(
      (row) =>
        [...form.querySelectorAll("select")].every((s) => s.value === "" || String(row[s.name]) === s.value) &&
        (!id || row.id.toLowerCase().includes(id)) &&
        (!text || texts(row).some((one) => one && one.toLowerCase().includes(text))),
    );
    start = 0;
    show();
  }

  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  function turn(pages) {
    start += pages * PAGE;
    show();
    section.querySelector(".filters").scrollIntoView({ block: "start" });
  }
  before.addEventListener("click", () => turn(-1));
  after.addEventListener("click", () => turn(1));
  filter();
}

function head(badge, kind, row, more) {
  const title = element("h3");
  title.append(element("span", badge, `badge ${kind}`), element("span", row.id));
  if (data.runs.length > 1) title.append(element("span", data.runs[row.run]));
  for (const fact of more) title.append(element("span", fact));
  return title;
}

function promptOf(row) {
  const folded = element("details");
  folded.append(element("summary", "Prompt"), element("pre", data.prompts[row.prompt]));
  return row.prompt === null ? "" : folded;
}

function logprob(value, tokens) {
  return tokens ? `${value.toFixed(2)} (${(value / tokens).toFixed(3)} a token)` : value.toFixed(2);
}

function sampleCard(row) {
  const card = element("article", undefined, "row");
  const facts = [`answer ${row.answer ?? "none"}`, `right: ${row.gold ?? "not known"}`, `${row.tokens} tokens`];
  const [q, p] = [row.logprob_q, row.logprob_plain];
  if (q !== null) facts.push(`log q as drawn ${logprob(q, row.tokens)}`);
  if (p !== null && p !== q) facts.push(`log p plain ${logprob(p, row.tokens)}`);
  if (row.leak) facts.push("cites the hint");
  card.append(
    head(row.status, row.status, row, [`iteration ${row.iteration}`, `attempt ${row.attempt}`, `${row.kind} prompt`]),
    element("p", facts.join(" · "), "facts"),
    element("pre", row.text),
    promptOf(row),
  );
  return card;
}

function flipCard(row) {
  const card = element("article", undefined, "row");
  const two = element("div", undefined, "two");
  for (const [i, name, text] of [[0, "Base model", row.before], [1, "Last model", row.after]]) {
    const side = element("div");
    side.append(element("h4", `${name}: ${row.statuses[i]}, answer ${row.answers[i] ?? "none"}`), element("pre", text));
    two.append(side);
  }
  const right = row.kind === "became right" ? "right" : "wrong";
  card.append(head(row.kind, right, row, [`right: ${row.gold ?? "not known"}`]), two, promptOf(row));
  return card;
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

const theme = document.getElementById("theme");
function nameTheme() {
  theme.textContent = isDark() ? "Light" : "Dark";
}
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  nameTheme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);
nameTheme();

for (const note of data.notes) {
  document.querySelector("#samples .notes").append(element("p", note, "note"));
}
const shared = (row) => (row.prompt === null ? "" : data.prompts[row.prompt]);
browse(document.getElementById("flips"), objects(data.flips), data.flips_total, "flips", (r) => [r.before, r.after, shared(r)], flipCard);
browse(document.getElementById("samples"), objects(data.samples), data.samples_total, "samples", (r) => [r.text, shared(r)], sampleCard);
