"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const COLOURS = ["#2f81f7", "#e07b00", "#12a176", "#d4549a", "#8d6bd8", "#b08800", "#d6453d", "#3fa7c4"];
const DASHES = ["solid", "dash", "dot", "dashdot"];
const FEW = 60; // points of a line whose points are marked

const colour = (run) => COLOURS[run % COLOURS.length];
const all = (selector) => [...document.querySelectorAll(selector)];

/* Plotly reads <b>, <a ...> and the like in texts: a name is not markup. */
const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;");

/* Samples: the slider goes through the steps of all runs; each run shows its newest grid at that step. */
function connectSlider() {
  const slider = document.getElementById("step");
  if (!slider) return;
  const images = all("img.student");
  for (const image of images) data.runs[image.dataset.run].grids.at(-1).uri = image.src;
  for (const image of all(".samples img")) image.classList.toggle("tiny", image.naturalWidth < 240);
  const steps = [...new Set(data.runs.flatMap((run) => run.grids.map((grid) => grid.step)))].sort((a, b) => a - b);
  slider.max = steps.length - 1;
  slider.value = slider.max;
  const show = () => {
    const step = steps[slider.value];
    for (const image of images) showGrid(image, step);
    slider.setAttribute("aria-valuetext", `step ${step}`);
    document.getElementById("step-shown").textContent = step.toLocaleString("en");
  };
  slider.addEventListener("input", show);
  show();
}

function showGrid(image, step) {
  const grids = data.runs[image.dataset.run].grids;
  const grid = grids.filter((each) => each.step <= step).at(-1) ?? grids[0];
  image.src = grid.uri;
  image.alt = image.alt.replace(/\d+$/, grid.step);
  image.parentElement.querySelector("span").textContent = `step ${grid.step.toLocaleString("en")}`;
}

/* Charts */
function linesOf(chart, runs, hours) {
  const several = data.runs.length > 1 && !chart.alone;
  const lines = Object.entries(chart.lines).flatMap(([column, label], place) =>
    runs.map((run) => ({ run, label, place, points: run.points[column] })));
  return lines.filter((line) => line.points).map(({ run, label, place, points }) => ({
    x: hours ? points.x.map((step) => timeAt(run.points.elapsed, step)) : points.x,
    y: points.y,
    name: plain([several ? run.name : "", label].filter(Boolean).join(", ")),
    mode: points.x.length <= FEW ? "lines+markers" : "lines",
    marker: { size: 5 },
    line: { width: 1.8, color: colour(several ? data.runs.indexOf(run) : place) },
  }));
}

/* The training time at a step, between the two nearest that were written. */
function timeAt(elapsed, step) {
  if (!elapsed) return null;
  const { x, y } = elapsed;
  const after = x.findIndex((each) => each >= step);
  if (after <= 0) return after < 0 ? y.at(-1) : y[0];
  return y[after - 1] + ((step - x[after - 1]) / (x[after] - x[after - 1])) * (y[after] - y[after - 1]);
}

function mapOf(run) {
  return !run.pool ? [] : [{
    ...run.pool,
    type: "heatmap",
    zmin: 0,
    colorscale: "Viridis",
    colorbar: { thickness: 10, tickformat: ".0%", outlinewidth: 0 },
    hovertemplate: "step %{x}<br>t = %{y:.3f} T<br>%{z:.1%} of the slots<extra></extra>",
  }];
}

function theme() {
  const style = getComputedStyle(document.documentElement);
  const [text, line] = ["--faint", "--line"].map((name) => style.getPropertyValue(name));
  const axis = {
    gridcolor: line, zerolinecolor: line, linecolor: line, exponentformat: "none", separatethousands: true, nticks: 6,
  };
  return {
    font: { color: text, family: "system-ui, sans-serif", size: 12 },
    xaxis: axis,
    yaxis: axis,
    modebar: { bgcolor: "rgba(0,0,0,0)", color: text, activecolor: style.getPropertyValue("--accent") },
    hoverlabel: { bgcolor: style.getPropertyValue("--panel"), bordercolor: line, font: { color: text } },
  };
}

/* Logarithmic ticks at 1, 2 and 5 where Plotly's own would run into each other. */
function spaceTicks(place) {
  const { type, range, dtick } = place.layout.yaxis;
  if (type !== "log" || !range) return undefined;
  const decades = Math.abs(range[1] - range[0]);
  const wanted = decades >= 1 && decades <= 3 ? "D2" : null;
  return wanted === (dtick ?? null) ? undefined : Plotly.relayout(place, { "yaxis.dtick": wanted });
}

function layoutOf(chart, traces, xTitle) {
  const positive = traces.every((trace) => !trace.y || trace.y.every((value) => value > 0));
  const look = theme();
  const log = chart.log && positive;
  return {
    ...look,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 56, r: 8, t: 26, b: 40 },
    showlegend: traces.length > 1,
    legend: { orientation: "h", y: -0.22, yanchor: "top" },
    hovermode: traces[0].type ? "closest" : "x unified",
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", // a finger scrolls the page
    xaxis: { ...look.xaxis, title: { text: plain(xTitle), standoff: 6 }, automargin: true },
    yaxis: {
      ...look.yaxis, title: { text: plain(chart.y), standoff: 4 }, automargin: true,
      ...(log ? { type: "log", tickformat: "~g" } : {}),
    },
  };
}

async function draw(place) {
  const chart = data.charts.find((each) => place.dataset.chart in each.lines);
  const run = data.runs[place.dataset.run];
  const isMap = place.dataset.chart === "t_00";
  const unit = chart.x === "training step" ? document.getElementById("axis")?.value : "";
  const traces = isMap ? mapOf(run) : linesOf(chart, chart.alone ? [run] : data.runs, unit);
  if (traces.length === 0) return;
  place.setAttribute("aria-label", isMap ? "Share of the pool in each bin of t, by training step" : summary(chart, traces));
  const isNew = !place.on;
  await Plotly.react(place, traces, layoutOf(chart, traces, unit && !isMap ? unit : chart.x), {
    responsive: true, displaylogo: false, modeBarButtons: [["zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"]],
  });
  await spaceTicks(place);
  if (isNew) place.on("plotly_relayout", () => spaceTicks(place));
}

/* What a chart says, for those who do not see it. */
function summary(chart, traces) {
  const ends = traces.map((trace) => {
    const last = trace.x.length - 1;
    return `${trace.name || chart.title}: ${trace.y[0]} at ${trace.x[0]}, ${trace.y[last]} at ${trace.x[last]}`;
  });
  return `${chart.title}. ${ends.join("; ")}`;
}

async function unpackPlotly() {
  const packed = atob(document.getElementById("plotly").textContent);
  const bytes = Uint8Array.from(packed, (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

async function drawCharts() {
  const places = all(".chart");
  if (places.length === 0) return;
  try {
    await unpackPlotly();
  } catch {
    document.getElementById("no-charts").hidden = false;
    return;
  }
  const drawAll = async () => {
    document.body.dataset.drawn = "no";
    await Promise.all(places.map(draw));
    document.body.dataset.drawn = "yes";
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  document.getElementById("axis")?.addEventListener("change", drawAll);
  await drawAll();
}

for (const swatch of all(".swatch")) swatch.style.background = colour(swatch.dataset.run);
connectSlider();
drawCharts();
