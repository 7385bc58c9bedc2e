// The chat: the list of conversations, the turns of one, the answer that streams in, and the box to write in.
"use strict";

neox.parts.conversations = (element, props, trigger, watch) => {
  const search = h("input", { type: "search", placeholder: "Search", "aria-label": "Search conversations", input: () => draw() });
  const list = h("ul", { class: "conversations" });
  const move = (name, data) => { moving = true; trigger(name, data); };
  const pick = async () => {
    const file = await neox.pick(".json,.md,.markdown,application/json,text/markdown");
    if (!file) return;
    if (file.size > 900000) neox.notice(`${file.name}: ${neox.bytes(file.size)}, more than the 0.9 MB that the page can import.`);
    else move("import", { name: file.name, text: await file.text() });
  };
  element.append(
    h("div", { class: "panel-head" }, h("h2", {}, "Conversations"),
      neox.tool("open", "Import a conversation", pick, { id: "nx-import" }),
      neox.tool("close", "Close the list", () => neox.toggle("conversations", false), { class: "tool narrow" })),
    h("button", { type: "button", class: "button new", id: "nx-new", click: () => neox.emit("new") }, neox.icon("plus"), "New conversation"),
    search, list,
  );
  const rename = async (entry) => {
    const title = await neox.ask("Rename the conversation", { value: entry.title, action: "Rename" });
    if (title !== null) trigger("rename", { id: entry.id, title });
  };
  const remove = async (entry) => {
    if (await neox.ask(`Delete “${entry.title}”?`, { action: "Delete" })) trigger("delete", { id: entry.id });
  };
  const when = (iso) => {
    const date = new Date(iso);
    const today = date.toDateString() === new Date().toDateString();
    return date.toLocaleString([], today ? { hour: "2-digit", minute: "2-digit" } : { day: "numeric", month: "short" });
  };
  const draw = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const entries = (props.value?.entries || []).filter((entry) => words.every((w) => entry.title.toLowerCase().includes(w)));
    list.replaceChildren(...entries.map((entry) => {
      const here = entry.id === props.value.current;
      return h("li", { class: here ? "here" : "" },
        h("button", { type: "button", class: "title", "aria-current": here ? "true" : null, title: entry.problem || entry.title,
          click: () => { neox.toggleIfNarrow("conversations"); move("open", { id: entry.id }); } },
          h("span", {}, entry.title), h("small", {}, entry.problem ? "cannot be read" : when(entry.updated))),
        !entry.problem && neox.tool("edit", `Rename ${entry.title}`, () => rename(entry)),
        neox.tool("trash", `Delete ${entry.title}`, () => remove(entry)));
    }));
    if (!entries.length) list.append(h("li", { class: "muted" }, words.length ? "No conversation has these words in its title" : "Your conversations will be kept here"));
  };
  neox.on("new", () => { neox.go("chat"); neox.toggleIfNarrow("conversations"); move("new", {}); });
  watch("value", () => draw());
  draw();
};
/** Whether another conversation has been asked for: until it is here, nothing is sent into the one before. */
let moving = true; // at first, the one that is remembered
neox.on("arrived", () => { moving = false; });
/** The conversation that this browser tab showed last, or else the one that any did. */
neox.arrive = () => neox.recall("conversation", sessionStorage) || neox.recall("conversation") || "";
neox.toggleIfNarrow = (panel) => neox.isOpen(panel) && neox.toggle(panel, false);

// Turns ---------------------------------------------------------------------------------------------------------------

neox.parts.transcript = (element, props, trigger, watch) => {
  const turns = h("div", { class: "turns", role: "log", "aria-label": "Conversation", "aria-live": "off" });
  const said = h("div", { class: "offscreen", "aria-live": "polite" });
  const foot = h("button", { type: "button", class: "to-end", hidden: true, click: () => end(true) }, "↓ Newest");
  const title = h("h2", { class: "conversation-title" });
  const exportAs = (kind) => trigger("export", { kind });
  const menu = h("details", { class: "menu" },
    h("summary", { class: "tool", "aria-label": "Export", title: "Export" }, neox.icon("save")),
    h("div", { class: "sheet" },
      h("button", { type: "button", click: () => { menu.open = false; exportAs("json"); } }, "Export as JSON"),
      h("button", { type: "button", click: () => { menu.open = false; exportAs("markdown"); } }, "Export as Markdown")));
  document.addEventListener("click", (event) => menu.contains(event.target) || (menu.open = false));
  const scroll = h("div", { class: "scroll", tabindex: "0", "aria-label": "Conversation", role: "region" }, turns);
  element.append(
    h("div", { class: "chat-head" },
      neox.tool("list", "Conversations", () => neox.toggle("conversations"), { id: "nx-open-conversations" }),
      title, neox.tool("code", "Raw prompt", () => trigger("raw", {})), menu),
    scroll, foot, said);

  // Stay at the end while it grows, unless the reader has scrolled up.
  let following = true;
  const end = (force) => { if (following || force) scroll.scrollTop = scroll.scrollHeight; };
  scroll.addEventListener("scroll", () => {
    following = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
    foot.hidden = following;
  });

  const act = (name, id, more = {}) => { if (!neox.isBusy("chat")) { following = true; trigger(name, { id, ...more }); } };

  const edit = (turn, box) => {
    const area = h("textarea", { class: "edit", "aria-label": "Edit the message", rows: "1" });
    area.value = turn.text;
    const done = (keep) => {
      const text = area.value;
      if (keep && text.trim() && text !== turn.text) act("edit", turn.id, { text });
      else draw();
    };
    area.addEventListener("input", () => fitHeight(area, 400));
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { event.stopPropagation(); done(false); }
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing && turn.role === "user") { event.preventDefault(); done(true); }
    });
    box.replaceChildren(area, h("div", { class: "actions" },
      h("button", { type: "button", class: "button", click: () => done(false) }, "Cancel"),
      h("button", { type: "button", class: "button primary", click: () => done(true) }, turn.role === "user" ? "Send" : "Save")));
    fitHeight(area, 400);
    area.focus();
  };

  const tools = (turn, box, last) => {
    const copy = neox.tool("copy", "Copy", async () => {
      await neox.copy(turn.text);
      copy.replaceChildren(neox.icon("check"));
      setTimeout(() => copy.replaceChildren(neox.icon("copy")), 1200);
    });
    const [at, of] = turn.place;
    return h("div", { class: "turn-tools", role: "group", "aria-label": turn.role === "user" ? "Your message" : "Answer" },
      of > 1 && h("span", { class: "siblings" },
        h("button", { type: "button", class: "tool", "aria-label": "Previous version", disabled: at === 1, click: () => act("switch", turn.id, { step: -1 }) }, "‹"),
        h("span", { "aria-label": `Version ${at} of ${of}` }, `${at}/${of}`),
        h("button", { type: "button", class: "tool", "aria-label": "Next version", disabled: at === of, click: () => act("switch", turn.id, { step: 1 }) }, "›")),
      copy,
      neox.tool("edit", "Edit", () => edit(turn, box)),
      turn.role === "assistant" && neox.tool("again", "Regenerate", () => act("regenerate", turn.id)),
      turn.role === "user" && last && neox.tool("again", "Answer", () => act("regenerate", turn.id)),
      turn.role === "assistant" && last && neox.tool("more", "Continue", () => act("continue", turn.id)),
      neox.tool("branch", "Branch into a new conversation", () => act("branch", turn.id)),
      turn.note && h("span", { class: "muted note" }, turn.note));
  };

  let live = null; // the answer that streams in
  const draw = () => {
    const value = props.value || { turns: [] };
    title.textContent = value.title || "";
    live = null;
    const nodes = [];
    value.turns.forEach((turn, i) => {
      if (value.dropped && i === value.dropped) nodes.push(h("p", { class: "dropped", role: "note" }, value.dropped_note));
      const body = h("div", { class: "body" });
      const box = h("article", { class: `turn ${turn.role}${i < value.dropped ? " old" : ""}`, "aria-label": turn.role === "user" ? "You" : value.model || "Answer" }, body);
      if (turn.role === "user") body.textContent = turn.text;
      else {
        const prose = new neox.Prose(body);
        prose.add(turn.text);
        if (turn.id === value.live) {
          live = { turn, prose, box };
          box.classList.add("live");
        } else prose.end();
      }
      if (turn.id !== value.live) box.append(tools(turn, body, i === value.turns.length - 1));
      nodes.push(box);
    });
    if (!nodes.length) nodes.push(welcome());
    turns.replaceChildren(...nodes);
    neox.setBusy("chat", live !== null);
    if (value.id) {
      neox.remember("conversation", value.id, sessionStorage);
      neox.remember("conversation", value.id);
    }
    end();
    if (value.id) neox.emit("arrived");
  };
  const welcome = () => {
    const ready = ["ready", "idle"].includes(neox.status?.state);
    return h("div", { class: "welcome" }, h("span", { class: "mark", "aria-hidden": "true" }),
      h("p", {}, ready ? "Write a message to begin." : "No model is loaded yet."),
      ready ? neox.status.base && h("p", { class: "muted" }, `${neox.status.name} is a base model: it continues text and was not taught to converse. The Notebook suits it better.`)
        : h("button", { type: "button", class: "button primary", click: () => neox.go("model") }, "Choose a model"));
  };

  neox.feeds.chat = (news) => {
    if (news.text && live) {
      live.turn.text += news.text;
      live.prose.add(news.text);
      end();
    }
    if (news.state && live) live.box.dataset.state = news.state;
    if (news.error) neox.notice(news.error);
    if (news.end) said.textContent = live ? live.turn.text.slice(0, 1000) : "";
  };
  let shown = "";
  neox.on("status", (status) => {
    const key = `${status.state} ${status.name} ${status.base}`;
    if (key !== shown && !props.value?.turns?.length) draw();
    shown = key;
  });
  neox.on("again", () => {
    const last = props.value?.turns?.at(-1);
    if (last) act("regenerate", last.id);
  });
  watch("value", draw);
  draw();
};

const fitHeight = (area, most) => {
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight + 2, most)}px`;
};

neox.parts.composer = (element, props, trigger, watch) => {
  const area = h("textarea", { rows: "1", placeholder: "Message", "aria-label": "Message", id: "nx-message" });
  const send = h("button", { type: "button", class: "send", "aria-label": "Send", title: "Send (Enter)", click: () => go() }, neox.icon("send"));
  const stop = h("button", { type: "button", class: "stop", "aria-label": "Stop", title: "Stop (Esc)", click: () => trigger("stop", {}) }, neox.icon("stop"));
  element.append(h("div", { class: "composer" }, area, send, stop));
  const go = () => {
    const text = area.value;
    if (moving) return document.addEventListener("neox:arrived", go, { once: true });
    if (!text.trim() || neox.isBusy("chat")) return;
    neox.notice("");
    area.value = "";
    fitHeight(area, 200);
    trigger("send", { text });
  };
  area.addEventListener("input", () => fitHeight(area, 200));
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.ctrlKey && !event.metaKey && !event.isComposing) {
      event.preventDefault();
      go();
    }
  });
  neox.on("stop", (view) => view === "chat" && trigger("stop", {}));
  neox.on("view", (view) => view === "chat" && setTimeout(() => area.focus({ preventScroll: true })));
  // What could not be sent comes back.
  watch("value", () => {
    if (props.value?.text && !area.value) area.value = props.value.text;
    fitHeight(area, 200);
  });
};
