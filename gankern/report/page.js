"use strict";
const shown = (v) => (Number.isInteger(v) ? v.toLocaleString("en").replaceAll(",", "\u202f") : String(Number(v.toPrecision(4))));
let timer = 0;

// Samples over time: each film shows its last picture at or before the slider's step.
function film() {
  const slider = document.getElementById("step");
  if (!slider) return;
  const steps = JSON.parse(slider.dataset.steps);
  const play = document.getElementById("play");
  const show = () => {
    const step = steps[slider.value];
    slider.setAttribute("aria-valuetext", "step " + step);
    document.getElementById("step-now").textContent = "step " + shown(step);
    for (const frames of document.querySelectorAll("[data-film]")) {
      const images = [...frames.querySelectorAll("img")];
      const current = images.findLast((image) => Number(image.dataset.step) <= step) || images[0];
      for (const image of images) image.hidden = image !== current;
    }
  };
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    play.textContent = "Play";
  };
  slider.addEventListener("input", () => { stop(); show(); });
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (Number(slider.value) >= steps.length - 1) slider.value = 0;
    show();
    play.textContent = "Pause";
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      show();
      if (Number(slider.value) >= steps.length - 1) stop();
    }, 400);
  });
  show();
}

// The read-out of a chart: pointer or arrow keys choose a place, the values there stand below.
function chart(figure) {
  const { x, low, high, series } = JSON.parse(figure.dataset.chart);
  const plot = figure.querySelector(".plot"), cursor = figure.querySelector(".cursor"), read = figure.querySelector(".read");
  const words = read.textContent;
  const places = [...new Set(series.flatMap((one) => one[1]))].sort((a, b) => a - b);
  const nearest = (all, value) => all.reduce((best, v, i) => (Math.abs(v - value) < Math.abs(all[best] - value) ? i : best), 0);
  let at = places.length - 1;
  const show = () => {
    const place = places[at];
    cursor.hidden = false;
    cursor.style.left = (high > low ? (100 * (place - low)) / (high - low) : 50) + "%";
    const values = series.map(([name, xs, ys]) => name + " " + shown(ys[nearest(xs, place)]));
    read.textContent = x + " " + shown(place) + ": " + values.join(", ");
  };
  const hide = () => { cursor.hidden = true; read.textContent = words; };
  const point = (event) => {
    const box = plot.getBoundingClientRect();
    at = nearest(places, low + ((event.clientX - box.left) / box.width) * (high - low));
    show();
  };
  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerdown", point);
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -places.length, End: places.length }[event.key];
    if (!move) return;
    event.preventDefault();
    at = Math.min(Math.max(at + move, 0), places.length - 1);
    show();
  });
}

function setUp() {
  film();
  document.querySelectorAll(".chart").forEach(chart);
}

// gankern watch: ask whether the run has moved on, and if so take the new page; what is open, chosen and focused stays so.
async function refresh() {
  const state = document.getElementById("live");
  try {
    const answer = await fetch("state.json", { cache: "no-store" });
    const { version, words } = await answer.json();
    if (version !== document.body.dataset.version && !timer && !document.querySelector(".plot:hover")) {
      const fresh = await (await fetch("main.html", { cache: "no-store" })).text();
      const slider = document.getElementById("step");
      const chosen = slider && slider.value !== slider.max ? slider.value : null;
      const open = [...document.querySelectorAll("details[open]")].map((one) => one.id);
      const focus = document.activeElement.id;
      document.querySelector("main").innerHTML = fresh;
      document.body.dataset.version = version;
      for (const id of open) document.getElementById(id)?.setAttribute("open", "");
      if (chosen !== null && document.getElementById("step")) document.getElementById("step").value = chosen;
      setUp();
      if (focus) document.getElementById(focus)?.focus({ preventScroll: true });
    }
    state.textContent = words;
  } catch {
    state.textContent = "gankern watch does not answer; this is the last that it said";
  }
  setTimeout(refresh, 2000);
}

setUp();
if (document.body.dataset.version) setTimeout(refresh, 2000);
