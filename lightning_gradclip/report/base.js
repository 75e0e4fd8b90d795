"use strict";
// The numbers in #data, and what all charts share. Colours come from the page's style, so a theme is one redraw.

const RUNS = JSON.parse(document.getElementById("data").textContent);
const DRAWN_POINTS = 1000, MEDIAN_FROM = 8;
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
  const letters = atob(text), bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  return new Kind(bytes.buffer);
}

for (const run of RUNS) {
  for (const [name, text] of Object.entries(run.norms)) {
    if (name === "medians") run.norms[name] = text.map(one => decoded(one));
    else if (name !== "width") run.norms[name] = decoded(text, /step/i.test(name) ? Float64Array : Float32Array);
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
