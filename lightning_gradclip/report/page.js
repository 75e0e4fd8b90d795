"use strict";
// Draws the charts from the numbers in #data. Colours come from the page's style, so a theme is one redraw.

const RUNS = JSON.parse(document.getElementById("data").textContent);
const DRAWN_POINTS = 1500;
const media = window.matchMedia("(prefers-color-scheme: dark)");
const touch = window.matchMedia("(pointer: coarse)").matches;

const color = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const runColor = place => color(`run-${place % 8}`);
// Plotly reads some HTML in texts; a name is shown as it is.
const plain = text => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const percent = share => `${share > 0 && share < 0.001 ? "less than 0.1" : +(share * 100).toPrecision(3)} %`;
const short = value => value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6) ? value.toExponential(2) : String(+value.toPrecision(4));
const narrow = element => element.clientWidth < 560;

function decoded(text, Kind = Float32Array) {
  const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
  return new Kind(bytes.buffer);
}

for (const run of RUNS) {
  for (const [name, text] of Object.entries(run.norms)) {
    if (name !== "width") run.norms[name] = decoded(text, /step/i.test(name) ? Float64Array : Float32Array);
  }
  for (const name in run.whatIf) run.whatIf[name] = decoded(run.whatIf[name], Float64Array);
  if (run.heat) for (const name of ["median", "largest"]) run.heat[name] = decoded(run.heat[name]);
}

function axis(more) {
  return { gridcolor: color("grid"), linecolor: color("line"), zeroline: false, automargin: true, ...more };
}

const logAxis = (more, low = 1, high = 1e9) => axis({ type: "log", exponentformat: "power", ...(high / low < 300 ? { dtick: "D2", tickformat: "~g" } : { minorloglabels: "none" }), ...more });

function layout(element, more) {
  return {
    font: { family: "system-ui, sans-serif", size: 13, color: color("text") },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: narrow(element) ? 44 : 60, r: 12, t: 12, b: 44 },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 12 } },
    hoverlabel: { bgcolor: color("card"), bordercolor: color("line"), font: { color: color("text") }, namelength: -1 },
    hovermode: "closest",
    // A finger that scrolls the page must not zoom.
    dragmode: touch ? false : "zoom",
    height: narrow(element) ? 330 : 400,
    uirevision: "kept",
    ...more,
  };
}

const CONFIG = {
  responsive: true, displaylogo: false, displayModeBar: touch ? false : "hover",
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
};

/** The buckets of a run between two steps, merged so that few points are drawn; every smallest and largest norm stays. */
function merged(norms, from, to) {
  const { step, highStep, low, median, high, lowClipped, highClipped, limit, changed, skipped, nonfinite } = norms;
  let first = step.findIndex((_, i) => i + 1 >= step.length || step[i + 1] > from);
  let last = step.findLastIndex(one => one <= to);
  first = Math.max(0, first - 1);
  last = Math.min(step.length - 1, Math.max(first, last + 1));
  const every = Math.ceil((last - first + 1) / DRAWN_POINTS);
  const groups = [];
  for (let begin = first; begin <= last; begin += every) {
    const end = Math.min(begin + every, last + 1);
    const one = { step: step[begin], highStep: highStep[begin], low: NaN, median: 0, high: NaN, lowClipped: NaN, highClipped: NaN, limit: limit[begin], changed: 0, skipped: 0, nonfinite: 0 };
    for (let i = begin; i < end; i++) {
      if (!(one.low <= low[i])) one.low = isNaN(low[i]) ? one.low : low[i];
      if (!(one.high >= high[i]) && !isNaN(high[i])) { one.high = high[i]; one.highStep = highStep[i]; }
      if (!(one.lowClipped <= lowClipped[i]) && !isNaN(lowClipped[i])) one.lowClipped = lowClipped[i];
      if (!(one.highClipped >= highClipped[i]) && !isNaN(highClipped[i])) one.highClipped = highClipped[i];
      one.median += median[i] / (end - begin);
      one.changed += changed[i] / (end - begin);
      one.skipped += skipped[i];
      one.nonfinite += nonfinite[i];
    }
    groups.push(one);
  }
  return { groups, single: every * norms.width === 1 };
}

function zigzag({ groups, single }, low, high) {
  if (single) return { x: groups.map(one => one.step), y: groups.map(one => one[high]) };
  return { x: groups.flatMap(one => [one.step, one.highStep]), y: groups.flatMap(one => [one[low], one[high]]) };
}

function markers(name, symbol, shade, size, groups, y, text) {
  return {
    type: "scatter", mode: "markers", name, x: groups.map(one => one.highStep), y: groups.map(y), text: groups.map(text),
    marker: { symbol, size, color: color(shade), line: { width: symbol.startsWith("x") ? 2 : 0, color: color(shade) } },
    hovertemplate: "step %{x:,d}<br>%{text}<extra></extra>",
  };
}

function normTraces(run, from, to) {
  const view = merged(run.norms, from, to), groups = view.groups;
  const line = (name, shade, more, points) => ({
    type: "scatter", mode: groups.length > 1 ? "lines" : "lines+markers", name, ...points, connectgaps: false,
    line: { color: color(shade), width: 1.4, ...more }, hovertemplate: `step %{x:,d}<br>${name} %{y:.4g}<extra></extra>`,
  });
  const after = run.observed ? "after clipping, had it been done" : "after clipping";
  const points = name => ({ x: groups.map(one => one.step), y: groups.map(one => one[name]) });
  const traces = run.eachStep
    ? [line("before clipping", "before", {}, zigzag(view, "low", "high"))]
    : [line("largest before clipping", "before", { dash: "dot" }, points("high")), line("mean before clipping", "before", {}, points("median"))];
  if (groups.some(one => one.changed > 0)) {
    traces.push(run.eachStep ? line(after, "after", {}, zigzag(view, "lowClipped", "highClipped")) : line(`mean ${after}`, "after", {}, points("highClipped")));
  }
  if (!view.single && run.eachStep) traces.push(line("median", "text", {}, points("median")));
  if (groups.some(one => !isNaN(one.limit))) {
    traces.push(line("limit", "limit", { dash: "dash", shape: "hv", width: 1.8 }, points("limit")));
  }
  const top = 2 * groups.reduce((most, one) => Math.max(most, one.high || 0, one.limit || 0), 0) || 1;
  const finite = groups.filter(one => one.high > 0);
  const said = one => `norm ${short(one.high)}` + (one.changed < 1 && !view.single ? `<br>${percent(one.changed)} of the steps here` : "");
  const clipped = finite.filter(one => one.changed > 0 && one.skipped <= one.nonfinite);
  if (clipped.length) traces.push(markers("clipped", "circle", "clipped", clipped.length > 200 ? 3.5 : 5, clipped, one => one.high, said));
  const dropped = groups.filter(one => one.skipped > 0 && one.skipped > one.nonfinite);
  if (dropped.length) traces.push(markers("dropped", "triangle-down", "dropped", 9, dropped, one => one.high || top, one => `${one.skipped} dropped, norm ${short(one.high)}`));
  const bad = groups.filter(one => one.nonfinite > 0);
  if (bad.length) traces.push(markers("NaN or infinite", "x-thin", "nonfinite", 9, bad, () => top, one => `${one.nonfinite} not finite` + (one.skipped ? ", dropped" : "")));
  return traces;
}

/** One scale for several runs, so that they can be compared: from the smallest norm to above the marks on top. */
const COMMON = RUNS.length > 1 ? commonRange() : null;

function commonRange() {
  let least = Infinity, most = 0;
  for (const { norms } of RUNS) {
    for (const one of norms.low) if (one > 0 && one < least) least = one;
    for (const one of norms.high) if (one > most) most = one;
  }
  return most > 0 ? [Math.log10(least / 1.5), Math.log10(most * 3)] : null;
}

function drawNorms(element, place) {
  const run = RUNS[place], { step } = run.norms;
  const whole = [step[0], Math.max(step[step.length - 1], run.norms.highStep[step.length - 1])];
  const draw = (from, to) => Plotly.react(element, normTraces(run, from, to), layout(element, {
    xaxis: axis({ title: { text: "step" }, exponentformat: "none", separatethousands: true }),
    yaxis: logAxis({ title: narrow(element) ? undefined : { text: "gradient norm" }, ...(COMMON ? { range: COMMON } : {}) }),
  }), CONFIG);
  const [from, to] = element.dataset.range ? JSON.parse(element.dataset.range) : whole;
  return draw(from, to).then(() => {
    element.removeAllListeners("plotly_relayout");
    element.on("plotly_relayout", change => {
      const zoomed = "xaxis.range[0]" in change, reset = change["xaxis.autorange"];
      if (!zoomed && !reset) return;
      const range = zoomed ? [change["xaxis.range[0]"], change["xaxis.range[1]"]] : whole;
      if (zoomed) element.dataset.range = JSON.stringify(range); else delete element.dataset.range;
      draw(...range);
    });
  });
}

/** The smallest and the largest limit that can be tried. */
const LIMITS = RUNS.filter(run => run.whatIf).map(run => run.whatIf.limit);
const SPAN = [Math.min(...LIMITS.map(one => one[0])), Math.max(...LIMITS.map(one => one[one.length - 1]))];

function guide(x, name, shade, side, row) {
  return {
    shape: { type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, line: { color: shade, width: 1.5, dash: name === "limit" ? "dash" : "dot" } },
    note: { x: Math.log10(x), y: 1 - 0.07 * row, yref: "paper", text: name, showarrow: false, xanchor: side, font: { size: 12, color: shade }, bgcolor: color("page"), borderpad: 1 },
  };
}

function drawSpread(element) {
  const alone = RUNS.length === 1;
  const traces = RUNS.map((run, place) => [run, place]).filter(([run]) => run.spread).map(([run, place]) => {
    const { edges, share } = run.spread;
    return {
      type: "scatter", mode: "lines", name: plain(run.name), showlegend: !alone, x: [edges[0], ...edges], y: [0, ...share, 0],
      line: { shape: "hv", color: runColor(place), width: 1.6 }, fill: "tozeroy", fillcolor: runColor(place) + (alone ? "44" : "22"),
      hovertemplate: `from norm %{x:.4g}<br>%{y:.2%} of the ${run.eachStep ? "steps" : "log events"}<extra></extra>`,
    };
  });
  const guides = RUNS.flatMap((run, place) => {
    const marks = alone && run.eachStep ? [["50", "median", "right"], ["90", "90 %", "right"], ["99", "99 %", "left"]] : [];
    const shown = marks.filter(([at]) => run.percentiles[at] > 0).map(([at, name, side], row) => guide(run.percentiles[at], name, color("soft"), side, row));
    return run.limit > 0 ? [...shown, guide(run.limit, alone ? "limit" : "", alone ? color("limit") : runColor(place), "left", 3)] : shown;
  });
  return Plotly.react(element, traces, layout(element, {
    xaxis: logAxis({ title: { text: "gradient norm" } }, ...SPAN), yaxis: axis({ tickformat: ".0%", rangemode: "tozero" }),
    shapes: guides.map(one => one.shape), annotations: guides.map(one => one.note).filter(one => one.text), showlegend: !alone,
  }), CONFIG);
}

let chosen = null;

function drawWhatIf(element) {
  const alone = RUNS.length === 1;
  const traces = RUNS.flatMap((run, place) => {
    if (!run.whatIf) return [];
    const { limit, share, mean, strongest } = run.whatIf, name = plain(run.name);
    const line = (label, y, more) => ({
      type: "scatter", mode: "lines", x: limit, y, ...(alone ? {} : { legendgroup: name }), name: alone ? label : name, showlegend: alone,
      line: { color: runColor(place), width: 2, ...more.line }, hovertemplate: `limit %{x:.4g}<br>${label} ${more.format}<extra>${alone ? "" : name}</extra>`, yaxis: more.yaxis,
    });
    return [
      { ...line(run.eachStep ? "steps clipped" : "log events with a clipped step", share, { format: "%{y:.2%}" }), showlegend: true },
      ...(run.eachStep ? [mean] : []).map(one => line("mean factor", one, { format: "%{y:.3g}", yaxis: "y2", line: { color: alone ? color("run-2") : runColor(place) } })),
      line("strongest factor", strongest, { format: "%{y:.3g}", yaxis: "y2", line: { color: alone ? color("run-1") : runColor(place), dash: "dot" } }),
    ];
  });
  const vertical = (x, shade, dash) => ({ type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, line: { color: shade, width: 1.5, dash } });
  const shapes = RUNS.filter(run => run.limit > 0).map(run => vertical(run.limit, alone ? color("limit") : runColor(RUNS.indexOf(run)), "dash"));
  if (chosen) shapes.push(vertical(chosen, color("accent"), "solid"));
  return Plotly.react(element, traces, layout(element, {
    height: narrow(element) ? 420 : 480, shapes,
    xaxis: logAxis({ title: { text: "limit" }, anchor: "y2" }, ...SPAN),
    yaxis: axis({ domain: [0.46, 1], tickformat: ".0%", range: [-0.03, 1.03] }),
    yaxis2: axis({ domain: [0, 0.38], range: [-0.05, 1.05] }),
  }), CONFIG);
}

function tryLimit() {
  const runs = RUNS.filter(run => run.whatIf);
  if (!runs.length) return;
  const slider = document.getElementById("limit");
  const [low, high] = SPAN.map(Math.log);
  chosen = Math.exp(low + (high - low) * slider.value / 1000);
  const lines = runs.map(run => {
    const { limit, mean, strongest } = run.whatIf, at = Math.max(0, limit.findLastIndex(one => one <= chosen));
    const share = run.whatIf.share[at];
    const most = share > 0 ? short(Math.min(1, strongest[at])) : "";
    const hard = !share ? "" : run.eachStep ? `, to ${short(mean[at])} of their length on average and ${most} where it is most` : `, to ${most} where it is most`;
    const what = run.eachStep ? `clips ${percent(share)} of the steps` : `clips a step between ${percent(share)} of the log events`;
    return `${RUNS.length > 1 ? `${run.name}: a` : "A"} limit of ${short(chosen)} ${what}${hard}.`;
  });
  document.getElementById("answer").textContent = lines.join(" ");
  slider.setAttribute("aria-valuetext", short(chosen));
}

function drawHeat(element, place) {
  const { names, total, marked, step, median, largest } = RUNS[place].heat, width = step.length;
  const positive = median.filter(one => one > 0);
  const least = positive.length ? Math.log10(positive.reduce((a, b) => Math.min(a, b))) : 0;
  const most = positive.length ? Math.log10(positive.reduce((a, b) => Math.max(a, b))) : 1;
  // A norm of zero is darker than the smallest one; where there was no gradient, nothing is drawn.
  const shade = one => one > 0 ? Math.log10(one) : one === 0 ? least - 0.5 : null;
  const row = (numbers, i) => Array.from(numbers.subarray(i * width, (i + 1) * width));
  const room = narrow(element) ? 18 : 42;
  const label = (name, i) => (marked[i] ? "▸ " : "") + plain(name.length > room ? `…${name.slice(1 - room)}` : name);
  const every = Math.ceil(names.length / 45);
  const crowded = i => marked.slice(Math.max(0, i - every + 1), i + every).some(Boolean);
  const ticks = names.map((_, i) => i).filter(i => marked[i] || (i % every === 0 && !crowded(i)));
  const powers = [];
  for (let power = Math.ceil(least); power <= most; power += Math.max(1, Math.round((most - least) / 6))) powers.push(power);
  return Plotly.react(element, [{
    type: "heatmap", x: step, y: names.map((_, i) => i), z: names.map((_, i) => row(median, i).map(shade)),
    customdata: names.map((name, i) => row(median, i).map((one, j) => [plain(name), isNaN(one) ? "none" : short(one), isNaN(one) ? "none" : short(largest[i * width + j])])),
    colorscale: "Viridis", hoverongaps: false, zmin: least === most ? least - 1 : least, zmax: most,
    colorbar: { title: { text: "norm" }, tickvals: powers, ticktext: powers.map(power => `10<sup>${power}</sup>`), thickness: 12, ...(narrow(element) ? { orientation: "h", y: 1.02, yanchor: "bottom", title: {} } : {}) },
    hovertemplate: "%{customdata[0]}<br>from step %{x:,d}<br>median %{customdata[1]}, largest %{customdata[2]}<extra></extra>",
  }], layout(element, {
    height: Math.max(260, Math.min(1400, 90 + names.length * (names.length > 45 ? 8 : 19))),
    xaxis: axis({ title: { text: total > names.length ? `step (${names.length} of ${total} scopes)` : "step" }, showgrid: false, exponentformat: "none", separatethousands: true }),
    yaxis: axis({ autorange: "reversed", tickvals: ticks, ticktext: ticks.map(i => label(names[i], i)), showgrid: false, tickfont: { size: 12 } }),
  }), CONFIG);
}

const CHARTS = { norms: drawNorms, spread: drawSpread, whatIf: drawWhatIf, heat: drawHeat };

function draw() {
  const elements = [...document.querySelectorAll("[data-chart]")];
  return Promise.all(elements.map(one => CHARTS[one.dataset.chart](one, Number(one.dataset.run))));
}

function theme(name) {
  document.documentElement.dataset.theme = name === "auto" ? (media.matches ? "dark" : "light") : name;
  return draw();
}

const wanted = () => document.querySelector("[name=theme]:checked").value;
for (const input of document.querySelectorAll("[name=theme]")) input.addEventListener("change", () => theme(wanted()));
media.addEventListener("change", () => theme(wanted()));
window.addEventListener("beforeprint", () => theme("light"));
window.addEventListener("afterprint", () => theme(wanted()));
document.getElementById("limit").addEventListener("input", () => {
  tryLimit();
  drawWhatIf(document.querySelector("[data-chart=whatIf]"));
});
tryLimit();
theme(wanted()).then(() => { document.documentElement.dataset.drawn = "yes"; });
