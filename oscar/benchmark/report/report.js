// Parts of the page: the plot, the image browser (with stage.js), the sortable tables. Values come as [number, text], the number null
// where there is none and "Infinity" where JSON has no word for it.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const toNumber = (value) => (value === null || value === undefined || value === "" ? NaN : Number(value));

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function shape(name, attributes = {}, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
}

/** Fill a container with radio buttons; options are [value, ...content of the label]. */
function choices(container, name, options, selected, onChange) {
  container.replaceChildren(...options.map(([value, ...content]) => {
    const input = element("input", { type: "radio", name, value });
    input.checked = value === selected;
    input.addEventListener("change", () => onChange(value));
    return element("label", {}, input, ...content);
  }));
}

const segment = (value, text) => [value, element("span", {}, text)];

// Plot

const SHAPES = [
  (r) => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`,
  (r) => `M${-0.88 * r} ${-0.88 * r}h${1.76 * r}v${1.76 * r}h${-1.76 * r}z`,
  (r) => `M0 ${-1.25 * r}L${1.2 * r} ${0.85 * r}H${-1.2 * r}z`,
  (r) => `M0 ${-1.3 * r}L${1.3 * r} 0L0 ${1.3 * r}L${-1.3 * r} 0z`,
  (r) => `M0 ${1.25 * r}L${1.2 * r} ${-0.85 * r}H${-1.2 * r}z`,
];

function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push([i * step, (i * step).toFixed(decimals)]);
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++) {
    for (const factor of [1, 2, 5]) {
      const value = factor * 10 ** power;
      if (value >= low && value <= high) found.push([value, value.toFixed(Math.max(0, -power))]);
    }
  }
  return found;
}

function startPlot() {
  const plot = byId("plot"), tip = byId("tip"), figure = plot.parentElement;
  // Of the paper's curves only its own codec's is shown at first.
  const hidden = new Set(data.series.filter((series) => series.reference && !series.ours));
  const rates = data.series.flatMap((series) => series.points.map((point) => toNumber(point.bpp[0]))).filter((bpp) => bpp > 0);
  let metric = data.metrics[0];
  let scale = Math.max(...rates) > 10 * Math.min(...rates) ? "log" : "linear";
  let drawn = []; // points on the plot: {x, y, series, point}
  let focused = -1;

  const hasValue = (series) => series.points.some((point) => Number.isFinite(toNumber(point.values[metric.name]?.[0])));

  function draw() {
    const width = Math.max(figure.clientWidth, 280), height = clamp(width * 0.6, 300, 500);
    const left = 52, right = 10, top = 34, bottom = 44;
    plot.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const curves = data.series.filter((series) => !hidden.has(series)).map((series) => ({
      series,
      points: series.points
        .map((point) => ({ point, bpp: toNumber(point.bpp[0]), value: toNumber(point.values[metric.name]?.[0]) }))
        .filter(({ bpp, value }) => bpp > 0 && Number.isFinite(bpp) && Number.isFinite(value))
        .sort((a, b) => a.bpp - b.bpp),
    })).filter(({ points }) => points.length);
    const all = curves.flatMap(({ points }) => points);
    drawn = [];
    focused = -1;
    tip.hidden = true;
    const title = `${metric.label}${metric.unit ? `, ${metric.unit}` : ""}`;
    plot.replaceChildren(
      shape("text", { class: "title", x: 0, y: 14 }, `${title}  ${metric.higher ? "↑ higher" : "↓ lower"} is better`),
      shape("text", { x: width - right, y: height - 6, "text-anchor": "end" }, `bits per pixel of the file${scale === "log" ? ", log scale" : ""}`),
    );
    if (!all.length) {
      plot.append(shape("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "No curve is shown; choose some in the legend."));
      plot.setAttribute("aria-label", `${title}: no curve shown`);
      return;
    }
    const log = scale === "log";
    const bpps = all.map((point) => point.bpp), values = all.map((point) => point.value);
    let [x0, x1] = log ? [Math.min(...bpps) / 1.2, Math.max(...bpps) * 1.2] : [0, Math.max(...bpps) * 1.04];
    let [y0, y1] = [Math.min(...values), Math.max(...values)];
    const margin = (y1 - y0) * 0.07 || Math.abs(y0) * 0.05 || 1;
    [y0, y1] = [y0 - margin, y1 + margin];
    const onAxis = log ? Math.log : (value) => value;
    const x = (bpp) => left + (onAxis(bpp) - onAxis(x0)) / (onAxis(x1) - onAxis(x0)) * (width - left - right);
    const y = (value) => height - bottom - (value - y0) / (y1 - y0) * (height - top - bottom);

    for (const [value, text] of ticks(y0, y1, height / 55)) {
      plot.append(shape("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
        shape("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, text));
    }
    let last = -Infinity;
    for (const [value, text] of log ? logTicks(x0, x1) : ticks(x0, x1, width / 90)) {
      plot.append(shape("line", { class: "grid", x1: x(value), x2: x(value), y1: top, y2: height - bottom }));
      if (x(value) - last < 42) continue;
      last = x(value);
      plot.append(shape("text", { class: "tick", x: last, y: height - bottom + 18, "text-anchor": "middle" }, text));
    }
    plot.append(shape("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));

    // The paper's curves beneath, ours on top.
    curves.sort((a, b) => (b.series.reference - a.series.reference) || (a.series.ours - b.series.ours));
    for (const { series, points } of curves) {
      const group = shape("g", { class: series.classes });
      const places = points.map(({ point, bpp, value }) => ({ x: x(bpp), y: y(value), series, point }));
      group.append(shape("polyline", { class: "curve", points: places.map((place) => `${place.x.toFixed(2)},${place.y.toFixed(2)}`).join(" ") }));
      for (const place of places) group.append(marker(series, place.x, place.y));
      plot.append(group);
      drawn.push(...places);
    }
    drawn.sort((a, b) => a.x - b.x);
    plot.append(shape("circle", { class: "ring", r: 8, visibility: "hidden" }));
    plot.setAttribute("aria-label", `${title} against bits per pixel. ` + curves.map(({ series, points }) =>
      `${series.label}: from ${points[0].point.values[metric.name][1]} at ${points[0].point.bpp[1]} to ` +
      `${points.at(-1).point.values[metric.name][1]} at ${points.at(-1).point.bpp[1]}`).join("; "));
  }

  function marker(series, x, y) {
    return shape("path", { class: "dot", d: SHAPES[series.shape](series.ours && !series.reference ? 5 : 3.8), transform: `translate(${x.toFixed(2)} ${y.toFixed(2)})` });
  }

  function point(index) {
    focused = index;
    const ring = plot.querySelector(".ring"), place = drawn[index];
    tip.hidden = !place;
    ring?.setAttribute("visibility", place ? "visible" : "hidden");
    if (!place) return;
    ring.setAttribute("transform", `translate(${place.x} ${place.y})`);
    const { series, point } = place;
    tip.replaceChildren(
      element("b", {}, element("i", { class: `key ${series.classes}` }), series.label), element("br"),
      `${metric.label} ${point.values[metric.name][1]}${metric.unit ? ` ${metric.unit}` : ""}`, element("br"),
      `${point.bpp[1]} bpp${point.setting === null ? ", read off the paper’s figure" : ` at setting ${point.setting}`}`,
    );
    // In CSS pixels, which differ from the plot's own where the page was zoomed or resized since drawing.
    const ratio = plot.clientWidth / plot.viewBox.baseVal.width;
    const [x, y] = [place.x * ratio, place.y * ratio];
    tip.style.left = `${clamp(x - tip.offsetWidth / 2, 0, figure.clientWidth - tip.offsetWidth)}px`;
    tip.style.top = `${y - tip.offsetHeight - 14 < 0 ? y + 16 : y - tip.offsetHeight - 14}px`;
  }

  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const ratio = plot.viewBox.baseVal.width / box.width;
    const distances = drawn.map((place) => Math.hypot(place.x - (event.clientX - box.left) * ratio, place.y - (event.clientY - box.top) * ratio));
    const nearest = distances.indexOf(Math.min(...distances));
    point(distances[nearest] < 40 ? nearest : -1);
  });
  plot.addEventListener("pointerleave", () => point(-1));
  plot.addEventListener("blur", () => point(-1));
  plot.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    if (event.key === "Escape") point(-1);
    if (!step || !drawn.length) return;
    event.preventDefault();
    point((Math.max(focused, step < 0 ? 0 : -1) + step + drawn.length) % drawn.length);
  });

  function legend() {
    const group = (title, list) => {
      const toggles = list.map((series) => {
        const swatch = shape("svg", { viewBox: "0 0 30 14", class: series.classes, "aria-hidden": "true" });
        swatch.append(shape("line", { class: "curve", x1: 1, x2: 29, y1: 7, y2: 7 }), marker(series, 15, 7));
        const toggle = element("button", { type: "button", class: series.ours ? "ours" : "", "aria-pressed": String(!hidden.has(series)) },
          swatch, element("span", {}, series.label));
        toggle.addEventListener("click", () => {
          hidden.has(series) ? hidden.delete(series) : hidden.add(series);
          toggle.setAttribute("aria-pressed", String(!hidden.has(series)));
          draw();
        });
        return toggle;
      });
      const all = element("button", { type: "button", class: "all" }, "all / none");
      all.addEventListener("click", () => {
        const show = list.some((series) => hidden.has(series));
        list.forEach((series, index) => {
          show ? hidden.delete(series) : hidden.add(series);
          toggles[index].setAttribute("aria-pressed", String(show));
        });
        draw();
      });
      return element("div", { role: "group", "aria-label": title }, element("h3", {}, title, all), ...toggles);
    };
    const shown = data.series.filter(hasValue);
    const groups = [["Measured here", shown.filter((series) => !series.reference)], ["The paper’s, read off its figures", shown.filter((series) => series.reference)]];
    byId("reference-note").hidden = !groups[1][1].length;
    byId("legend").replaceChildren(...groups.filter(([, list]) => list.length).map(([title, list]) => group(title, list)));
  }

  choices(byId("metric"), "metric", data.metrics.map((item) => segment(item.name, item.label)), metric.name, (name) => {
    metric = data.metrics.find((item) => item.name === name);
    legend();
    draw();
  });
  choices(byId("scale"), "scale", [segment("linear", "linear"), segment("log", "log")], scale, (name) => {
    scale = name;
    draw();
  });
  legend();
  new ResizeObserver(draw).observe(figure);
}

// Image browser

function startBrowser() {
  const stage = byId("stage"), fit = startStage(document);
  const sides = ["left", "right"].map((side) => ({
    select: byId(`${side}-codec`), image: byId(`${side}-image`),
    chip: byId(`${side}-layer`).querySelector(".chip"), entry: null,
  }));
  let current, lead, rate;

  const codecs = new Map(data.images.flatMap((item) => item.entries).map((entry) => [entry.codec, entry]));
  const ours = [...codecs.values()].find((entry) => entry.ours), other = [...codecs.values()].find((entry) => !entry.ours);

  /** The entries whose points are the rates to choose from: ours, or the first codec's if none is ours. */
  function leads() {
    const found = current.entries.filter((entry) => entry.ours);
    return found.length ? found : current.entries.filter((entry) => entry.codec === current.entries[0]?.codec);
  }

  /** A codec's entry for the chosen rate: made for it, or else the nearest in bytes; null for the original. */
  function entryOf(codec) {
    const entries = current.entries.filter((entry) => entry.codec === codec);
    const made = entries.filter((entry) => (entry.ours || entry === lead ? entry.point : entry.matched) === rate);
    const distance = (entry) => Math.abs(entry.bytes - lead.bytes);
    return (made.length ? made : entries).reduce((best, entry) => (!best || distance(entry) < distance(best) ? entry : best), null);
  }

  const bytes = (count) => (count === null ? "no file" : `${count.toLocaleString("en")} bytes`);

  function show() {
    lead = leads().find((entry) => entry.point === rate) ?? null;
    for (const side of sides) {
      const entry = (side.entry = entryOf(side.select.value));
      side.image.src = byId(entry ? entry.image : current.original).textContent;
      side.image.alt = `${current.name}, ${entry ? `${entry.label} at setting ${entry.setting}, ${bytes(entry.bytes)}` : "original"}`;
      side.chip.textContent = entry ? `${entry.label} · ${bytes(entry.bytes)}` : "Original";
    }
    stage.setAttribute("aria-label", `${sides[0].image.alt}, beside ${sides[1].image.alt}`);
    facts();
  }

  function facts() {
    const entries = sides.map((side) => side.entry);
    const row = (name, cell, higher = null) => {
      const cells = entries.map((entry) => (entry ? cell(entry) : [null, "–"]));
      const [a, b] = cells.map(([value]) => toNumber(value));
      return element("tr", {}, element("th", { scope: "row" }, name), ...cells.map(([, text], index) =>
        element("td", higher !== null && (index ? higher === b > a : higher === a > b) && a - b ? { class: "better" } : {}, text)));
    };
    const names = entries.map((entry) => element("th", { scope: "col" }, entry ? element("i", { class: `key ${entry.classes}` }) : "", entry ? entry.label : "Original"));
    const ratio = (entry) => [null, entry.bytes && lead.bytes ? `${(entry.bytes / lead.bytes).toFixed(2)} ×` : "–"];
    byId("facts").replaceChildren(
      byId("facts").caption,
      element("thead", {}, element("tr", {}, element("td"), ...names)),
      element("tbody", {},
        row("setting", (entry) => [null, entry.setting]),
        row("file, bytes", (entry) => [null, entry.bytes === null ? "no file" : entry.bytes.toLocaleString("en")]),
        ...(lead ? [row(`relative to ${lead.ours ? "ours" : lead.label}`, ratio)] : []),
        row("actual bpp", (entry) => entry.bpp),
        ...data.metrics.map((metric) => row(`${metric.label}${metric.unit ? ` ${metric.unit}` : ""}`, (entry) => entry.values[metric.name] ?? [null, "–"], metric.higher))),
    );
    const raw = 3 * current.width * current.height;
    const larger = entries.find((entry) => entry && !entry.ours && lead && entry.bytes > lead.bytes && entry.matched === rate);
    byId("facts-note").classList.toggle("warn", Boolean(larger));
    byId("facts-note").textContent = larger
      ? `${larger.label} cannot be as small as this: its smallest file is ${(larger.bytes / lead.bytes).toFixed(larger.bytes < 10 * lead.bytes ? 1 : 0)} times ours.`
      : `${current.width} × ${current.height} pixels, ${raw.toLocaleString("en")} bytes raw. ● marks the better value.`;
  }

  function chooseImage(index) {
    current = data.images[index];
    const points = [...new Map(leads().map((entry) => [entry.point, entry.setting]))].sort((a, b) => a[0] - b[0]);
    if (!points.some(([point]) => point === rate)) rate = points[Math.floor(points.length / 2)]?.[0];
    byId("rate-legend").textContent = `Rate of ${leads()[0]?.label ?? "the codec"}`;
    choices(byId("rate"), "rate", points.map(([point, setting]) => segment(point, setting)), rate, (value) => {
      rate = value;
      show();
    });
    show();
    fit(current);
  }

  for (const [side, first] of [[sides[0], other], [sides[1], ours ?? other]]) {
    side.select.append(...[["", "Original"], ...[...codecs.values()].map((entry) => [entry.codec, entry.label])].map(([value, text]) => element("option", { value }, text)));
    side.select.value = first ? first.codec : "";
    side.select.addEventListener("change", show);
  }
  if (sides[0].select.value === sides[1].select.value) sides[0].select.value = "";
  choices(byId("strip"), "image", data.images.map((item, index) => [index, element("img", { src: item.thumb, alt: "" }), element("span", {}, item.name)]), 0, chooseImage);
  chooseImage(0);
}

// Tables

function startTables() {
  const order = new Intl.Collator("en", { numeric: true });
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
    for (const row of body.rows) {
      const [, colour] = row.className.match(/^(c\d)/) ?? [];
      const cell = row.cells[heads.findIndex((head) => head.textContent === "codec")];
      if (!colour || !cell) continue;
      cell.classList.add("codec");
      cell.prepend(element("i", { class: `key ${colour}` }));
    }
    heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
      const descending = head.ariaSort === "ascending";
      const text = head.classList.contains("text");
      const keyed = [...body.rows].map((row) => ({ row, key: row.cells[column].dataset.value }));
      keyed.sort((a, b) => {
        if (!a.key || !b.key) return !a.key - !b.key; // unavailable comes last, either way
        const compared = text ? order.compare(a.key, b.key) : Number(a.key) - Number(b.key) || 0; // equal infinities
        return descending ? -compared : compared;
      });
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      body.append(...keyed.map(({ row }) => row));
    }));
  }
  for (const search of document.querySelectorAll("input[type=search]")) {
    search.addEventListener("input", () => {
      const words = search.value.toLowerCase();
      for (const row of search.parentElement.querySelectorAll("tbody tr")) row.hidden = !row.textContent.toLowerCase().includes(words);
    });
  }
}

if (data.metrics.length) startPlot();
if (data.images.length) startBrowser();
startTables();
