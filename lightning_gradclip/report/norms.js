// The norm step by step: of a long run few points are drawn, and more of them where somebody looks closer.

/**
 * The buckets of a run between two steps, merged by a power of two so that few points are drawn; every smallest and
 * largest norm stays. The medians are those of the steps themselves, for each power.
 */
function merged(norms, from, to) {
  const { step, highStep, low, medians, high, lowClipped, highClipped, limit, changed, skipped, nonfinite } = norms;
  let first = step.findIndex((_, i) => i + 1 >= step.length || step[i + 1] > from);
  let last = step.findLastIndex(one => one <= to);
  first = Math.max(0, first - 1);
  last = Math.min(step.length - 1, Math.max(first, last + 1));
  const power = Math.min(medians.length - 1, Math.max(0, Math.ceil(Math.log2((last - first + 1) / DRAWN_POINTS))));
  const every = 2 ** power;
  first -= first % every;
  const groups = [];
  for (let begin = first; begin <= last; begin += every) {
    const end = Math.min(begin + every, last + 1);
    const one = { step: step[begin], highStep: highStep[begin], low: NaN, median: medians[power][begin / every], high: NaN, lowClipped: NaN, highClipped: NaN, limit: limit[begin], changed: 0, skipped: 0, nonfinite: 0 };
    for (let i = begin; i < end; i++) {
      if (!(one.low <= low[i])) one.low = isNaN(low[i]) ? one.low : low[i];
      if (!(one.high >= high[i]) && !isNaN(high[i])) { one.high = high[i]; one.highStep = highStep[i]; }
      if (!(one.lowClipped <= lowClipped[i]) && !isNaN(lowClipped[i])) one.lowClipped = lowClipped[i];
      if (!(one.highClipped >= highClipped[i]) && !isNaN(highClipped[i])) one.highClipped = highClipped[i];
      one.changed += changed[i] / (end - begin);
      one.skipped += skipped[i];
      one.nonfinite += nonfinite[i];
    }
    groups.push(one);
  }
  return { groups, size: every * norms.width, single: every * norms.width === 1 };
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
  // Of few steps it would lie on the norms and hide them.
  if (view.size >= MEDIAN_FROM && run.eachStep) traces.push(line("median", "text", {}, points("median")));
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
const COMMON = RUNS.length > 1 ? extent(RUNS) : null;

/** The smallest norm above zero and the largest; null if there is none. */
function extent(runs) {
  let least = Infinity, most = 0;
  for (const { norms } of runs) {
    for (const one of norms.low) if (one > 0 && one < least) least = one;
    for (const one of norms.high) if (one > most) most = one;
  }
  return most > 0 ? [least, most] : null;
}

function drawNorms(element, place) {
  const run = RUNS[place], { step } = run.norms;
  const whole = [step[0], Math.max(step[step.length - 1], run.norms.highStep[step.length - 1])];
  const [low, high] = COMMON ?? extent([run]) ?? [];
  const fixed = COMMON ? { range: [Math.log10(low / 1.5), Math.log10(high * 3)] } : {};
  const draw = (from, to) => Plotly.react(element, normTraces(run, from, to), layout(element, {
    // Also of a single line, so that charts side by side are level.
    showlegend: true,
    xaxis: axis({ title: { text: "step" }, exponentformat: "none", separatethousands: true }),
    yaxis: logAxis({ title: narrow(element) ? undefined : { text: "gradient norm" }, ...fixed }, low, high),
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
