// The page's own behaviour: what needs no server (menus, theme, starters), the way of clicks on the page's own markup to
// Gradio (`onebox_ask`, `onebox_act`, `onebox_follow`, set by the bridge component), and what the browser keeps while
// the page's process is away: the conversation in the address, the unsent text and the message on its way in the tab.
(() => {
  "use strict";
  if (window.onebox) return; // Gradio runs scripts of the head twice
  const store = {
    get: (key) => { try { return localStorage.getItem("onebox." + key); } catch { return null; } },
    set: (key, value) => { try { localStorage.setItem("onebox." + key, value); } catch { /* private window */ } },
  };
  // Of this tab alone: `draft` is the text in the box; `sent` a message that may not have reached the server.
  const tab = {
    get: (key) => { try { return JSON.parse(sessionStorage.getItem("onebox." + key)); } catch { return null; } },
    set: (key, value) => { try { sessionStorage.setItem("onebox." + key, JSON.stringify(value)); } catch { /* full */ } },
    drop: (key) => { try { sessionStorage.removeItem("onebox." + key); } catch { /* private window */ } },
  };
  const $ = (selector) => document.querySelector(selector);
  // Gradio scopes the page's styles to its container, so states that styles read are marked inside it.
  const app = () => $("#ob-app");
  const conversation = () => new URLSearchParams(location.search).get("c") ?? "";
  const locate = (c) => {
    if (c === conversation()) return;
    const url = new URL(location.href);
    if (c) url.searchParams.set("c", c);
    else url.searchParams.delete("c");
    history.replaceState(history.state, "", url);
  };
  const newKey = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (n) => n.toString(16).padStart(2, "0")).join("");
  let again = null; // a message that came back into the box after a reload, and its key

  window.onebox = {
    language: () => store.get("lang"),
    conversation,
    // An exchange begins: until the server has spoken, the page itself shows that it runs.
    begin: () => {
      app().dataset.obState = "running";
      app().classList.remove("ob-following");
      const log = $("#ob-chat .bubble-wrap");
      if (log) log.scrollTop = log.scrollHeight;
    },
    // The message in the box goes out under a key of its own, which it keeps if it has to be sent once more.
    send: (inputs) => {
      const [current, lang, shown, text, task] = inputs;
      if (!text.trim() || app().dataset.obState === "running") return [current, lang, shown, "", task, ""];
      const same = again && again.text === text && again.c === conversation();
      const key = same ? again.key : newKey();
      again = null;
      tab.set("sent", { text, key, c: conversation(), turns: turns() });
      window.onebox.begin();
      fill("");
      return [current, lang, shown, text, task, key];
    },
  };

  const mark = () => $("#ob-beacon [data-state]");
  const turns = () => Number(mark()?.dataset.turns ?? 0);

  const setTheme = (dark) => document.body.classList.toggle("dark", dark);
  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  const applyTheme = () => {
    const saved = store.get("theme");
    setTheme(saved ? saved === "dark" : systemDark.matches);
  };
  systemDark.addEventListener("change", applyTheme);

  const fill = (text) => {
    const box = $("#ob-input textarea");
    if (!box) return;
    box.value = text;
    box.dispatchEvent(new Event("input", { bubbles: true }));
    box.focus();
    box.setSelectionRange(text.length, text.length);
  };

  const sidebar = (open) => {
    app().classList.toggle("ob-side-open", open);
    const target = open ? $("#ob-side .ob-new") : $(".ob-burger");
    if (target && target.offsetParent) target.focus();
  };

  const rename = (id) => {
    const row = $(`#ob-list li[data-id="${CSS.escape(id)}"]`);
    const button = row && row.querySelector(".ob-open");
    if (!button) return;
    const input = document.createElement("input");
    input.className = "ob-rename";
    input.value = button.textContent;
    input.setAttribute("aria-label", button.textContent);
    button.replaceWith(input);
    let done = false;
    const finish = (keep) => {
      if (done) return;
      done = true;
      const title = input.value.trim();
      input.replaceWith(button);
      if (keep && title && title !== button.textContent) window.onebox_act({ ob: "rename", id, title });
    };
    input.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Enter") finish(true);
      if (event.key === "Escape") finish(false);
    });
    input.addEventListener("blur", () => finish(true));
    input.focus();
    input.select();
  };

  const local = {
    starter: (data) => fill(data.text),
    dismiss: (_, button) => { const box = button.closest(".ob-notice"); if (box) box.remove(); },
    sidebar: () => sidebar(!app().classList.contains("ob-side-open")),
    theme: () => {
      const dark = !document.body.classList.contains("dark");
      store.set("theme", dark ? "dark" : "light");
      setTheme(dark);
    },
    language: (data) => { store.set("lang", data.lang); window.onebox_act({ ob: "language", lang: data.lang }); },
    copy: async (data, button) => {
      try {
        await navigator.clipboard.writeText(data.text);
      } catch {
        const area = document.createElement("textarea");
        area.value = data.text;
        document.body.append(area);
        area.select();
        document.execCommand("copy");
        area.remove();
        button.focus();
      }
      button.classList.add("done");
      announce($("#ob-beacon [data-copied]")?.dataset.copied ?? "");
      setTimeout(() => button.classList.remove("done"), 1500);
    },
    rename: (data) => rename(data.id),
    delete: (data, button) => {
      if (button.dataset.sure) window.onebox_act({ ob: "delete", id: data.id });
      else { button.dataset.sure = "1"; button.textContent = data.confirm; }
    },
  };

  document.addEventListener("click", (event) => {
    const target = event.target instanceof Element ? event.target : null;
    if (!target) return;
    const inside = target.closest("details.ob-chip, details.ob-more");
    for (const open of document.querySelectorAll("details.ob-chip[open], details.ob-more[open]")) {
      if (open !== inside) open.removeAttribute("open");
    }
    if (app()?.classList.contains("ob-side-open") && !target.closest("#ob-side, .ob-burger")) sidebar(false);
    if (inside && target.closest("a")) inside.removeAttribute("open");
    const button = target.closest("[data-ob], [data-ob-local]");
    if (!button || button.closest(".message-content")) return;
    const data = { ...button.dataset };
    const keep = data.obLocal === "delete" && !data.sure;
    if (inside && !keep) inside.removeAttribute("open");
    if (data.obLocal) local[data.obLocal]?.(data, button);
    else if (data.ob === "route" || data.ob === "retry") window.onebox_ask(data);
    else {
      window.onebox_act(data);
      if (data.ob === "open" || data.ob === "new") { app().classList.remove("ob-side-open"); $("#ob-input textarea")?.focus(); }
    }
  });

  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing) return;
    const open = document.querySelector("details.ob-chip[open], details.ob-more[open]");
    if (open) { open.removeAttribute("open"); open.querySelector("summary")?.focus(); return; }
    if (app().classList.contains("ob-side-open")) { sidebar(false); return; }
    const stop = $("#ob-stop");
    if (stop && stop.offsetParent) stop.click();
  });

  const live = document.createElement("div");
  live.className = "ob-sr";
  live.setAttribute("role", "status");
  live.setAttribute("aria-live", "polite");

  const announce = (text) => {
    live.textContent = "";
    if (text) setTimeout(() => { live.textContent = text; }, 50);
  };

  // A restart of the page's process: wait for it, then load anew. The address and the tab keep what is not stored.
  let away = false;
  let left = -Infinity; // when the reader left the page: what breaks then is no restart, and is not loaded over
  addEventListener("beforeunload", () => { left = performance.now(); });
  const leave = () => {
    if (away) return;
    away = true;
    const note = document.createElement("p");
    note.className = "ob-away";
    note.setAttribute("role", "status");
    note.textContent = mark()?.dataset.away ?? "";
    app().classList.add("ob-is-away");
    $("#ob-composer")?.prepend(note);
    const look = async () => {
      try {
        if (performance.now() - left > 5000 && (await fetch("healthz", { cache: "no-store" })).ok) { location.reload(); return; }
      } catch { /* still away */ }
      setTimeout(look, 400);
    };
    look();
  };
  const watchConnection = () => {
    for (const toast of document.querySelectorAll("[data-testid=toast-body].error")) {
      if (!/connection/i.test(toast.textContent)) continue;
      (toast.closest(".toast-wrap") ?? toast).style.display = "none";
      leave();
    }
  };

  const box = () => $("#ob-input textarea");
  const keepDraft = () => { if (box()) tab.set("draft", box().value); };
  const restore = () => {
    const sent = tab.get("sent");
    let text = tab.get("draft") ?? "";
    tab.drop("sent");
    if (sent && turns() <= sent.turns) {
      again = sent;
      text = text ? `${sent.text}\n\n${text}` : sent.text;
    }
    if (text) fill(text);
  };

  let seen = "";
  let first = true;
  const read = () => {
    watchConnection();
    const here = app()?.dataset.obState === "running" && $("#ob-chat [data-c]");
    if (here) learn(here.dataset.c);
    const found = mark();
    if (!found || found.outerHTML === seen) return;
    seen = found.outerHTML;
    const { c, state, lang, chatLabel } = found.dataset;
    document.documentElement.lang = lang;
    app().dataset.obState = state;
    app().classList.toggle("ob-following", state === "running");
    locate(c);
    announce(found.dataset.announce);
    const log = $("#ob-chat [role=log]");
    if (log) { log.setAttribute("aria-live", "off"); log.setAttribute("aria-label", chatLabel); }
    app().classList.add("ob-ready");
    if (first) restore();
    else if (state === "idle") tab.drop("sent");
    first = false;
    if (state === "running") window.onebox_follow(c);
  };
  // A new chat has its address as soon as it has an id, so that a reload finds the reply.
  const learn = (c) => {
    locate(c);
    const sent = tab.get("sent");
    if (sent && sent.c !== c) tab.set("sent", { ...sent, c });
  };

  const start = () => {
    document.body.append(live);
    applyTheme();
    document.addEventListener("input", (event) => { if (event.target === box()) keepDraft(); });
    window.addEventListener("pagehide", keepDraft);
    new MutationObserver(read).observe(document.body, { childList: true, subtree: true, attributes: true, attributeFilter: ["data-stamp"] });
    read();
  };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
