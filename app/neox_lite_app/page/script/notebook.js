// The notebook: one text that the model continues, at its end or at the cursor, and the probabilities of its tokens.
"use strict";

const LEVELS = [[0.8, "80 % and more"], [0.5, "50–80 %"], [0.2, "20–50 %"], [0.05, "5–20 %"], [0, "below 5 %"]];
const level = (share) => LEVELS.findIndex(([least]) => share >= least);
const percent = (share) => (share >= 0.0995 ? `${Math.round(share * 100)} %` : share >= 0.001 ? `${(share * 100).toFixed(1)} %` : "< 0.1 %");
const visible = (text) => text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "∅";

neox.parts.notebook = (element, props, trigger) => {
  const area = h("textarea", { id: "nx-text", "aria-label": "Text", spellcheck: "false",
    placeholder: "Write the beginning of a text, and let the model go on." });
  const tokens = h("div", { class: "tokens", role: "group", "aria-label": "Tokens with their probabilities; arrow keys go from one to the next", hidden: true });
  const alternatives = h("div", { class: "alternatives", role: "tooltip", id: "nx-alternatives", hidden: true });
  const legend = h("div", { class: "legend", hidden: true }, h("span", {}, "Probability"),
    ...LEVELS.map(([, label], i) => h("span", { class: `token level-${i}` }, label)), h("span", { class: "token unknown" }, "not scored"));
  let runs = []; // scored stretches of the text: {start, spans: [[text, share, [[text, share]]]]}, in order
  let history = []; // texts to go back to
  let now = null; // the completion that is coming: {at, start, spans}

  const button = (icon, label, title, click, cls = "") =>
    h("button", { type: "button", class: `button ${cls}`, title, click }, neox.icon(icon), h("span", {}, label));
  const complete = button("more", "Complete", "Continue at the end (Ctrl + Enter)", () => run("end"), "primary run");
  const insert = button("edit", "At cursor", "Continue at the cursor from what stands before it (Ctrl + Shift + Enter)", () => run("cursor"), "run");
  const stop = button("stop", "Stop", "Stop (Esc)", () => trigger("stop", {}), "primary halt");
  const undo = button("undo", "Undo", "Take back the last completion", () => back());
  const score = button("check", "Score text", "Show how probable the model finds the text that stands here", () => run("score"), "run");
  const show = h("input", { type: "checkbox", role: "switch", id: "nx-probabilities", change: () => view() });
  undo.disabled = true;
  element.append(
    h("div", { class: "notebook" },
      h("div", { class: "page" }, area, tokens), legend,
      h("div", { class: "bar" }, complete, insert, stop, undo, score,
        h("label", { class: "switch", for: "nx-probabilities" }, show, h("span", {}, "Probabilities")))),
    alternatives);

  const keep = () => neox.remember("notebook", area.value);
  area.value = neox.recall("notebook") || "";
  window.addEventListener("pagehide", keep); // in the middle of a completion

  // Completing ----------------------------------------------------------------------------------------------------------

  const run = (mode) => {
    if (neox.isBusy("notebook")) return;
    neox.notice("");
    const at = mode === "cursor" ? area.selectionStart : area.value.length;
    const text = area.value.slice(0, at);
    if (!trigger(mode === "score" ? "score" : "complete", { text, scores: show.checked || mode === "score", settings: neox.settings() })) return;
    if (mode !== "score") {
      history.push({ text: area.value, runs });
      history = history.slice(-50);
    }
    now = { at, mode };
    neox.setBusy("notebook", true);
    area.readOnly = true;
  };
  const back = () => {
    const before = history.pop();
    if (!before) return;
    area.value = before.text;
    runs = before.runs;
    undo.disabled = !history.length;
    keep();
    if (show.checked) draw();
    area.focus();
  };

  /** Text that comes in: where the completion stands, without touching the rest. */
  const put = (text) => {
    const [top, atEnd] = [area.scrollTop, area.scrollHeight - area.scrollTop - area.clientHeight < 60];
    area.setRangeText(text, now.at, now.at, "end");
    runs = runs.map((r) => (r.start >= now.at && r !== now.run ? { ...r, start: r.start + text.length } : r));
    now.at += text.length;
    area.scrollTop = atEnd ? area.scrollHeight : top;
  };
  const scored = (spans) => {
    if (!now.run) {
      now.run = { start: now.mode === "score" ? 0 : now.begin, spans: [] };
      runs = now.mode === "score" ? [now.run] : [...runs, now.run].sort((a, b) => a.start - b.start);
    }
    now.run.spans.push(...spans);
    if (show.checked) append(spans);
  };

  neox.onUpdate("completion", (update) => {
    if (!now) return;
    now.begin ??= now.at;
    if (update.text) put(update.text);
    if (update.spans) scored(update.spans);
    if (update.end) {
      const { mode, at, begin } = now;
      if (mode !== "score" && at === begin) history.pop();
      now = null;
      neox.setBusy("notebook", false);
      area.readOnly = false;
      undo.disabled = !history.length;
      keep();
      if (mode === "score" && update.end !== "error") show.checked = true;
      view();
      if (!show.checked) {
        area.focus({ preventScroll: true });
        area.setSelectionRange(at, at);
      }
    }
  });

  // An edit ends what is known of the text behind it.
  let last = area.value;
  area.addEventListener("beforeinput", () => { last = area.value; });
  area.addEventListener("input", () => {
    let same = 0;
    const least = Math.min(last.length, area.value.length);
    while (same < least && last[same] === area.value[same]) same += 1;
    runs = runs.filter((r) => r.start < same).map((r) => ({ start: r.start, spans: cut(r.spans, same - r.start) }));
    keep();
  });
  const cut = (spans, room) => {
    const kept = [];
    for (const span of spans) {
      room -= span[0].length;
      if (room < 0) break;
      kept.push(span);
    }
    return kept;
  };
  area.addEventListener("keydown", (event) => {
    if (event.key === "Tab" || event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    run(event.shiftKey ? "cursor" : "end");
  });
  neox.on("stop", (name) => name === "notebook" && trigger("stop", {}));
  neox.on("lost", () => { trigger("stop", {}); neox.emit("update:completion", { end: "error" }); });

  // Probabilities -------------------------------------------------------------------------------------------------------

  const view = () => {
    const on = show.checked;
    tokens.hidden = legend.hidden = !on;
    area.hidden = on;
    insert.disabled = on;
    if (on) draw();
    else hide();
  };
  const chip = (span) => {
    const [text, share, top] = span;
    const known = share != null;
    const chip = h("span", { class: `token ${known ? `level-${level(share)}` : "unknown"}${/^\s*\n/.test(text) ? " break" : ""}`, tabindex: "-1", role: "button",
      "aria-label": `${visible(text)}${known ? `, ${percent(share)}` : ""}` }, text);
    chip.span = span;
    if (!top.length && !known) chip.removeAttribute("role");
    return chip;
  };
  const append = (spans) => {
    const atEnd = tokens.scrollHeight - tokens.scrollTop - tokens.clientHeight < 60;
    tokens.append(...spans.map(chip));
    if (!tokens.querySelector("[tabindex='0']")) tokens.querySelector(".token")?.setAttribute("tabindex", "0");
    if (atEnd) tokens.scrollTop = tokens.scrollHeight;
  };
  /** The text with its scored stretches; where a stretch no longer says what the text says, the text holds. */
  const draw = () => {
    hide();
    tokens.replaceChildren();
    let at = 0;
    for (const { start, spans } of runs) {
      if (start < at) continue;
      tokens.append(area.value.slice(at, start));
      at = start;
      for (const span of spans) {
        if (area.value.slice(at, at + span[0].length) !== span[0]) break;
        append([span]);
        at += span[0].length;
      }
    }
    tokens.append(area.value.slice(at));
    if (!area.value) tokens.append(h("p", { class: "muted" }, "There is no text yet."));
  };
  const hide = () => {
    alternatives.hidden = true;
    tokens.querySelector(".shown")?.removeAttribute("aria-describedby");
    tokens.querySelector(".shown")?.classList.remove("shown");
  };
  const reveal = (chip) => {
    hide();
    const [text, share, top] = chip.span;
    if (share == null) return;
    chip.classList.add("shown");
    chip.setAttribute("aria-describedby", "nx-alternatives");
    const rows = top.some(([other]) => other === text) ? top : [...top, [text, share]];
    alternatives.replaceChildren(...rows.map(([other, p]) =>
      h("div", { class: other === text ? "row chosen" : "row" }, h("code", {}, visible(other)),
        h("span", { class: "meter", "aria-hidden": "true", style: `--share: ${p}` }), h("b", {}, percent(p)))));
    alternatives.hidden = false;
    place(chip);
  };
  const place = (chip) => {
    const [box, size] = [chip.getBoundingClientRect(), alternatives.getBoundingClientRect()];
    alternatives.style.left = `${Math.max(8, Math.min(box.left, window.innerWidth - size.width - 8))}px`;
    alternatives.style.top = `${box.bottom + size.height + 12 > window.innerHeight ? box.top - size.height - 6 : box.bottom + 6}px`;
  };
  /** Away from the mouse, what has the focus counts. */
  const settle = () => (chipAt(document.activeElement)?.span ? reveal(document.activeElement) : hide());
  const chipAt = (node) => node.closest?.(".tokens .token");
  tokens.addEventListener("mouseover", (event) => chipAt(event.target)?.span && reveal(chipAt(event.target)));
  tokens.addEventListener("mouseleave", settle);
  tokens.addEventListener("focusin", settle);
  tokens.addEventListener("focusout", hide);
  tokens.addEventListener("scroll", () => tokens.querySelector(".shown") && place(tokens.querySelector(".shown")));
  tokens.addEventListener("click", (event) => chipAt(event.target)?.focus({ preventScroll: true }));
  tokens.addEventListener("keydown", (event) => {
    const all = [...tokens.querySelectorAll(".token")];
    const at = all.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
    if (at < 0 || to === undefined || !all[to]) return;
    event.preventDefault();
    all[at].tabIndex = -1;
    all[to].tabIndex = 0;
    all[to].focus();
  });
};
