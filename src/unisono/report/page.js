"use strict";
// Draws the figures of the page, in the colours of its theme, and keeps a live page up to date.
(async () => {
  const root = document.documentElement;
  const element = (id) => document.getElementById(id);
  const figures = new Map(Object.entries(JSON.parse(element("figures").textContent)));
  let over = "steps";

  // Plotly comes packed in a report, and from the server on a live page.
  const packed = element("plotly");
  if (packed) {
    const bytes = Uint8Array.from(atob(packed.textContent.trim()), (c) => c.charCodeAt(0));
    const code = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
    const script = document.createElement("script");
    script.textContent = code;
    document.head.append(script);
    packed.remove();
  }

  // A string "--name" is the colour that the theme gives this name.
  const painted = (value, style) => {
    if (typeof value === "string") return value.startsWith("--") ? style.getPropertyValue(value).trim() || value : value;
    if (Array.isArray(value)) return value.some((item) => typeof item !== "number") ? value.map((item) => painted(item, style)) : value;
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, painted(item, style)]));
  };
  const merged = (under, above) => {
    if (above === undefined) return under;
    const plain = (v) => v !== null && typeof v === "object" && !Array.isArray(v);
    if (!plain(under) || !plain(above)) return above;
    const result = { ...under };
    for (const key of Object.keys(above)) result[key] = merged(under[key], above[key]);
    return result;
  };
  const axis = {
    gridcolor: "--grid", zeroline: false, linecolor: "--rule", ticks: "",
    title: { font: { size: 12, color: "--muted" }, standoff: 8 }, tickfont: { size: 11.5, color: "--muted" },
  };
  const base = {
    font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: "--ink" },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
    colorway: ["--blue", "--orange", "--green", "--violet", "--red", "--teal", "--brown", "--grey"],
    legend: { orientation: "h", yanchor: "bottom", y: 1.02, x: 0, font: { size: 12.5, color: "--muted" } },
    margin: { l: 12, r: 10, t: 10, b: 42 }, hovermode: "x unified", dragmode: "zoom",
    hoverlabel: { bgcolor: "--card", bordercolor: "--rule", font: { size: 12, color: "--ink" } },
  };
  const settings = { responsive: true, displaylogo: false, displayModeBar: false, doubleClick: "reset" };

  const draw = (key) => {
    const place = element(`figure-${key}`);
    const figure = figures.get(key);
    if (!place || !figure) return;
    const seconds = over === "seconds" ? figure.seconds : null;
    const data = seconds ? figure.data.map((trace, number) => ({ ...trace, x: seconds.x[number] })) : figure.data;
    let layout = merged(base, merged(figure.layout, seconds ? seconds.layout : undefined));
    const narrow = place.clientWidth < 460;
    for (const name of Object.keys({ xaxis: 0, yaxis: 0, ...layout }).filter((name) => /^[xy]axis\d*$/.test(name))) {
      layout[name] = merged(axis, layout[name] ?? {});
      if (name.startsWith("y")) layout[name] = { automargin: true, ...layout[name] };
      else if (narrow) layout[name] = { nticks: 5, ...layout[name] };
    }
    // What a reader has zoomed into stays while new steps arrive, but not when the axis becomes another one.
    layout = { ...layout, height: figure.height, uirevision: over };
    place.style.height = `${figure.height}px`;
    const style = getComputedStyle(root);
    // An application's figure may be one that this Plotly cannot draw; the others are drawn all the same.
    const failed = (error) => { place.style.height = ""; place.textContent = `This figure cannot be drawn: ${error?.message ?? error}`; };
    try {
      Plotly.react(place, painted(data, style), painted(layout, style), settings).catch(failed);
    } catch (error) {
      failed(error);
    }
  };
  const drawAll = () => { for (const key of figures.keys()) draw(key); root.dataset.drawn = String(figures.size); };

  for (const button of document.querySelectorAll(".switch button")) {
    button.addEventListener("click", () => {
      over = button.value;
      for (const other of document.querySelectorAll(".switch button")) other.setAttribute("aria-pressed", String(other === button));
      drawAll();
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  document.addEventListener("click", async (event) => {
    const button = event.target.closest(".copy button");
    if (!button) return;
    const code = button.previousElementSibling;
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "copied";
      setTimeout(() => { button.textContent = "copy"; }, 1500);
    } catch {  // not allowed here: let the reader copy it
      getSelection().selectAllChildren(code);
    }
  });
  drawAll();

  const live = document.body.dataset.live;
  if (!live) return;

  // ---- a live page: ask for news, and change only what is new
  const setHtml = (place, html) => { if (place.dataset.html !== html) { place.innerHTML = html; place.dataset.html = html; } };
  const apply = (news) => {
    document.title = news.title;
    setHtml(element("head"), news.head);
    const main = document.querySelector("main");
    const keys = new Set(news.sections.map((section) => section.key));
    for (const old of [...main.children]) if (!keys.has(old.id)) { figures.delete(old.id); old.remove(); }
    let before = null;
    for (const section of news.sections) {
      let card = element(section.key);
      if (!card) {
        card = document.createElement("section");
        card.id = section.key;
        card.innerHTML = '<div class="words"></div><div class="figure"></div><div class="body"></div>';
        card.children[1].id = `figure-${section.key}`;
      }
      const follows = before ? before.nextElementSibling : main.firstElementChild;
      if (follows !== card) main.insertBefore(card, follows);
      card.className = section.half ? "half" : "";
      setHtml(card.querySelector(".words"), section.words);
      setHtml(card.querySelector(".body"), section.body);
      card.querySelector(".figure").hidden = !section.figure;
      if (section.figure) { figures.set(section.key, section.figure); draw(section.key); } else figures.delete(section.key);
      before = card;
    }
    root.dataset.drawn = String(figures.size);
  };
  const say = (kind, text) => {
    const state = document.querySelector(".state");
    if (state) { state.className = `state ${kind}`; state.lastChild.textContent = text; }
  };
  let version = live, changed = Date.now(), failures = 0, ended = false, waits = 1000;
  const ask = async () => {
    try {
      const answer = await fetch(`state?since=${encodeURIComponent(version)}`, { cache: "no-store" });
      if (answer.status === 200) {
        const news = await answer.json();
        version = news.version; ended = news.ended; changed = Date.now();
        apply(news);
      } else if (!answer.ok) throw new Error(String(answer.status));
      if (failures && answer.status === 204) say("live", "unisono watch is back");
      failures = 0;
      const quiet = Math.round((Date.now() - changed) / 1000);
      if (!ended && quiet >= 60 && version !== "empty") say("stale", `Nothing new for ${Math.floor(quiet / 60)} min`);
      root.dataset.version = version;
      waits = ended ? 5000 : 1000;
    } catch {
      failures += 1;
      if (!ended) say("stale", "unisono watch has ended; this page is no longer updated");
      waits = Math.min(15000, 1000 * 2 ** failures);
    }
    setTimeout(ask, waits);
  };
  setTimeout(ask, 500);
})();
