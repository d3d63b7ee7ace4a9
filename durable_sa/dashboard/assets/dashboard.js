// Keys, local times, selection, and the refreshing of pages. Everything else works without it.
"use strict";
(() => {
  const REFRESH = 5000;
  const one = (selector) => document.querySelector(selector);
  const all = (selector) => [...document.querySelectorAll(selector)];
  const two = (number) => String(number).padStart(2, "0");

  // Times: local, with UTC beside.
  function localize() {
    for (const time of all("time[datetime]:not([title])")) {
      const at = new Date(time.dateTime);
      if (isNaN(at)) continue;
      const day = `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())}`;
      time.title = time.textContent;
      time.textContent = `${day} ${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;
    }
    const zone = one("#zone");
    if (zone) zone.textContent = `local (${Intl.DateTimeFormat().resolvedOptions().timeZone}); UTC when pointed at`;
  }

  // Selection of tasks.
  const boxes = () => all('input[name="task_id"][form="selection"]');
  function count() {
    const chosen = boxes().filter((box) => box.checked).length;
    const shown = one("#selected");
    if (shown) shown.textContent = chosen;
    for (const button of all("#selection button")) button.disabled = chosen === 0;
    const every = one("#every");
    if (every) every.checked = chosen > 0 && chosen === boxes().length;
  }
  document.addEventListener("change", (event) => {
    if (event.target.id === "every") for (const box of boxes()) box.checked = event.target.checked;
    count();
  });
  document.addEventListener("submit", (event) => {
    const button = event.submitter;
    if (event.target.id === "selection" && button && button.classList.contains("danger")) {
      const number = boxes().filter((box) => box.checked).length;
      if (!confirm(`${button.textContent} ${number} ${number === 1 ? "task" : "tasks"}?`)) event.preventDefault();
    }
  });

  // Keys.
  const rows = () => all("tr[data-href]");
  let current = null;
  function move(step) {
    const list = rows();
    if (!list.length) return;
    const at = list.findIndex((row) => row.id === current);
    const next = list[Math.min(Math.max(at < 0 ? (step > 0 ? 0 : list.length - 1) : at + step, 0), list.length - 1)];
    current = next.id;
    mark();
    next.scrollIntoView({ block: "nearest" });
  }
  function mark() {
    for (const row of rows()) {
      row.classList.toggle("current", row.id !== "" && row.id === current);
      if (row.classList.contains("current")) row.setAttribute("aria-selected", "true");
      else row.removeAttribute("aria-selected");
    }
  }
  const marked = () => rows().find((row) => row.id === current);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    const on = event.target;
    if (on.matches("input:not([type=checkbox]), textarea, select")) {
      if (event.key === "Escape") on.blur();
      return;
    }
    const row = marked();
    if (event.key === "/") one(".find input")?.focus();
    else if (event.key === "j") move(1);
    else if (event.key === "k") move(-1);
    else if (event.key === "x" && row) {
      const box = row.querySelector("input[type=checkbox]");
      if (box) { box.checked = !box.checked; count(); }
    } else if (event.key === "Enter" && row && !on.closest("a, button, summary")) location.href = row.dataset.href;
    else if (event.key === "?") one("#keys").showModal();
    else return;
    event.preventDefault();
  });
  document.addEventListener("click", (event) => {
    if (event.target.closest("#help")) one("#keys").showModal();
    else if (event.target.closest("#theme")) {
      const root = document.documentElement;
      const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
      root.dataset.theme = dark ? "light" : "dark";
      localStorage.setItem("durable-theme", root.dataset.theme);
    } else if (!event.target.closest("a, button, input, label, summary, details, form")) {
      const row = event.target.closest("tr[data-href]");
      if (row && !String(getSelection())) location.href = row.dataset.href;
    }
  });

  // Refreshing: only what has changed is replaced, and not what the user is about to change. A hidden field or a button
  // says what a form acts on, and follows the row that is shown.
  const TYPED = "textarea, input:not([type=hidden], [type=checkbox])";
  Idiomorph.defaults.callbacks.beforeAttributeUpdated = (name, element) =>
    name === "value" ? !element.matches(TYPED) : !["open", "checked", "selected"].includes(name);
  setInterval(() => {
    const live = one("#live[hx-get]");
    if (live && !document.hidden) htmx.trigger(live, "refresh");
  }, REFRESH);
  document.addEventListener("htmx:afterSwap", () => { localize(); count(); mark(); });

  const going = one("form[data-continue]");
  if (going) setTimeout(() => going.requestSubmit(), 200);
  localize();
  count();
})();
