"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const bytes = Uint8Array.from(atob(document.getElementById("packed").textContent), (c) => c.charCodeAt(0));
  const attention = new Uint16Array(bytes.buffer);
  const size = data.attention.size;
  const layer = document.getElementById("layer"), head = document.getElementById("head");
  const holder = (name) => document.querySelector(`[data-figure="${name}"]`);

  // Colours come from the style sheet, so that figures follow the reader's light or dark form.
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const scale = (name) => css(name).split(" ").map((color, i, all) => [i / (all.length - 1), color]);
  const colours = (name) => scale(name === "effect" ? "--sides" : "--heat");

  function themed(name) {
    const { data: traces, layout } = data.figures[name];
    const font = { ...layout.font, color: css("--ink"), family: getComputedStyle(document.body).fontFamily };
    const hoverlabel = { ...layout.hoverlabel, bgcolor: css("--raised"), bordercolor: css("--line"),
      font: { ...layout.hoverlabel.font, color: css("--ink") } };
    return [traces.map((trace) => ({ ...trace, colorscale: colours(name) })), { ...layout, font, hoverlabel }];
  }
  function draw() {
    for (const name of Object.keys(data.figures)) {
      Plotly.react(holder(name), ...themed(name), { displayModeBar: false, responsive: true });
    }
    show();
  }

  // Attention: one figure, restyled; a small picture of every head of the layer beside it.
  const at = (l, h) => (l * head.options.length + h) * size * size;
  function rows(l, h) {
    const start = at(l, h);
    return Array.from({ length: size }, (_, q) =>
      Array.from({ length: size }, (_, k) => Math.round(attention[start + q * size + k] / 6.5535) / 1e4));
  }
  function show() {
    const l = layer.selectedIndex, h = head.selectedIndex;
    const trace = data.figures.pattern.data[0];
    trace.z = rows(l, h);
    Plotly.restyle(holder("pattern"), { z: [trace.z] });
    const score = (name) => data.figures[name].data[0].z[l][h].toFixed(3);
    document.getElementById("scores").textContent =
      `induction ${score("induction")}, previous token ${score("previous")}`;
    thumbs(l, h);
  }
  function select(l, h) {
    layer.selectedIndex = l; head.selectedIndex = h; show();
  }
  const channels = (color) => [1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16));
  function palette() {
    const stops = css("--heat").split(" ").map(channels);
    return Array.from({ length: 256 }, (_, v) => {
      const x = (v / 255) * (stops.length - 1), i = Math.min(Math.floor(x), stops.length - 2);
      return stops[i].map((c, channel) => c + (x - i) * (stops[i + 1][channel] - c));
    });
  }
  function picture(canvas, l, h, colors) {
    canvas.width = canvas.height = size;
    canvas.style.imageRendering = size < 100 ? "pixelated" : "auto";
    const image = new ImageData(size, size), start = at(l, h);
    for (let i = 0; i < size * size; i++) {
      image.data.set(colors[attention[start + i] >> 8], 4 * i);
      image.data[4 * i + 3] = 255;
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  }
  function thumbs(l, h) {
    const box = document.getElementById("thumbs"), colors = palette();
    box.replaceChildren(...Array.from(head.options, (_, i) => {
      const button = document.createElement("button"), canvas = document.createElement("canvas");
      picture(canvas, l, i, colors);
      button.setAttribute("aria-pressed", i === h);
      button.append(canvas, `L${l}H${i}`);
      button.onclick = () => { select(l, i); box.children[i].focus(); };
      return button;
    }));
  }

  // Tokens: a card with what the model expected.
  const card = document.getElementById("card");
  function element(tag, text) {
    const made = document.createElement(tag);
    made.textContent = text;
    return made;
  }
  function line(...parts) {
    const p = element("p", "");
    p.append(...parts);
    return p;
  }
  function bar([label, p]) {
    const item = element("li", ""), fill = element("i", "");
    fill.style.setProperty("--p", p);
    item.append(element("code", label), fill, element("b", p.toFixed(3)));
    return item;
  }
  function open(span) {
    const index = Number(span.dataset.token), [label, p, guesses] = data.tokens[index];
    const list = element("ol", "");
    list.className = "bars";
    list.append(...guesses.map(bar));
    const likely = p === null ? "the first token" : `probability ${p.toFixed(4)}`;
    card.replaceChildren(line(element("b", label), ` at ${index}: ${likely}`), line("expected after it"), list);
    card.hidden = false;
    const box = span.getClientRects()[0], high = card.offsetHeight, wide = card.offsetWidth;
    const below = box.bottom + 8;
    card.style.top = `${below + high > innerHeight ? Math.max(8, box.top - high - 8) : below}px`;
    card.style.left = `${Math.max(8, Math.min(box.left, innerWidth - wide - 8))}px`;
  }
  for (const span of document.querySelectorAll(".token")) {
    for (const event of ["mouseenter", "focus"]) span.addEventListener(event, () => open(span));
    for (const event of ["mouseleave", "blur"]) span.addEventListener(event, () => { card.hidden = true; });
  }

  draw();
  layer.onchange = head.onchange = show;
  for (const name of ["induction", "previous"]) {
    holder(name).on("plotly_click", ({ points: [point] }) => reveal(...point.pointIndex));
  }
  function reveal(l, h) {
    select(Number(l), Number(h));
    document.getElementById("attention-section").scrollIntoView({ behavior: "smooth" });
  }
  for (const button of document.querySelectorAll(".link")) {
    button.onclick = () => reveal(button.dataset.layer, button.dataset.head);
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
