// The other charts, the theme, and the limit that can be tried.

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

const elements = [...document.querySelectorAll("[data-chart]")];
const draw = one => CHARTS[one.dataset.chart](one, Number(one.dataset.run));

function colored(name) {
  document.documentElement.dataset.theme = name === "auto" ? (media.matches ? "dark" : "light") : name;
}

function theme(name) {
  colored(name);
  if (window.Plotly) elements.forEach(draw);
}

/** Unpacks what draws; a browser that cannot, from before 2023, shows the tables. */
async function unpack() {
  const packed = new Blob([decoded(document.getElementById("plotly").textContent, Uint8Array)]);
  const script = document.createElement("script");
  script.textContent = await new Response(packed.stream().pipeThrough(new DecompressionStream("gzip"))).text();
  document.head.append(script);
}

/** At first one after the other, so that what is seen first is there first. */
async function drawAll() {
  for (const one of elements) {
    await draw(one);
    await new Promise(done => setTimeout(done));
  }
}

const wanted = () => document.querySelector("[name=theme]:checked").value;
for (const input of document.querySelectorAll("[name=theme]")) input.addEventListener("change", () => theme(wanted()));
media.addEventListener("change", () => theme(wanted()));
window.addEventListener("beforeprint", () => theme("light"));
window.addEventListener("afterprint", () => theme(wanted()));
document.getElementById("limit").addEventListener("input", () => {
  tryLimit();
  if (window.Plotly) drawWhatIf(document.querySelector("[data-chart=whatIf]"));
});
tryLimit();
colored(wanted());
unpack().then(drawAll).then(() => { document.documentElement.dataset.drawn = "yes"; });
