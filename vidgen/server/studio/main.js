// Where the page begins: its views, its address, its keys, its link to the server.
import { Clips } from "./clips.js";
import { reducedMotion } from "./dom.js";
import { follow } from "./events.js";
import { Films } from "./films.js";
import { JobList } from "./jobs.js";
import { openSession } from "./key.js";
import { theModel } from "./model.js";
import { Narrator, cancelJob } from "./progress.js";
import { go, route, startRouter } from "./router.js";
import { Shortcuts } from "./shortcuts.js";
import { isFinished, jobOf, listen } from "./store.js";

const VIEW_OF = { clips: "clips", clip: "clips", compare: "clips", films: "films", jobs: "jobs" };
const viewNow = () => VIEW_OF[route()[0]] ?? "clips";

async function start() {
  notice("Opening the model…");
  await openSession();
  const model = await theModel();
  document.getElementById("model").textContent = model.id;
  notice(null);
  const clips = new Clips(model);
  const films = new Films(model);
  new JobList();
  narrate();
  const shortcuts = new Shortcuts(keys(clips, films, () => shortcuts.help()), viewNow);
  document.getElementById("help").addEventListener("click", () => shortcuts.help());
  startRouter((parts, quietly) => open(parts, quietly, clips, films));
  follow((isThere) => notice(isThere ? null : "The service can’t be reached; trying again…"));
}

/** Show the view of an address; the focus goes to its heading unless it is to stay. */
function open([name, ...rest], quietly, clips, films) {
  const view = VIEW_OF[name] ?? "clips";
  for (const section of document.querySelectorAll("section[data-view]")) {
    const isShown = section.dataset.view === view;
    if (isShown && section.hidden && !quietly && !rest.length) {
      section.hidden = false;
      section.querySelector("h1").focus();
    }
    section.hidden = !isShown;
    if (!isShown) for (const video of section.querySelectorAll("video")) video.pause();
  }
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = { clips: "vidgen studio", films: "Films · vidgen studio", jobs: "Jobs · vidgen studio" }[view];
  if (view === "clips") clips.open(name === "clips" ? [] : rest.slice(0, 2), quietly);
  if (view === "films") films.open(rest[0], quietly);
}

/** Announce jobs to screen readers. */
function narrate() {
  const narrator = new Narrator();
  listen((what, id) => {
    const job = jobOf(id);
    if (job && (what === "status" || what === "progress")) narrator.narrate(job);
  });
}

function notice(text) {
  const element = document.getElementById("notice");
  if (element.textContent === (text ?? "")) return;
  element.textContent = text ?? "";
  element.hidden = !text;
}

/** Press a button of the shown clip by its words. */
const press = (words) => () => {
  const found = [...document.querySelectorAll("#stage button, #stage a")]
    .find((each) => each.textContent.trim() === words);
  found?.focus();
  found?.click();
};

function keys(clips, films, help) {
  const neighbour = (by) => () => {
    const id = clips.gallery.neighbour(by);
    if (id) go("clip", id);
  };
  const cancel = () => {
    const job = clips.ids.map(jobOf).find((each) => each && !isFinished(each));
    if (job) cancelJob(job);
  };
  const focus = (view, get) => () => {
    if (viewNow() !== view) go(view);
    get().focus();
    get().scrollIntoView({ block: "nearest", behavior: reducedMotion() ? "instant" : "smooth" });
  };
  return [
    { keys: ["Ctrl+Enter"], words: "Make the clip", view: "clips", run: () => clips.composer.send() },
    { keys: ["Ctrl+Enter"], words: "Make the film", view: "films", run: () => films.editor.render() },
    { keys: ["/", "n"], words: "To the prompt", run: focus("clips", () => clips.composer.prompt) },
    { keys: ["s"], words: "Lock the seed, or draw a new one", view: "clips", run: () => clips.composer.toggleLock() },
    { keys: ["c"], words: "Change a word", view: "clips", run: press("Change a word") },
    { keys: ["e"], words: "Extend the clip", view: "clips", run: press("Extend") },
    { keys: ["r"], words: "Replay the clip", view: "clips", run: press("Replay") },
    { keys: ["u"], words: "Use the clip’s settings", view: "clips", run: press("Use settings") },
    { keys: ["i"], words: "Recipe", view: "clips", run: press("Recipe") },
    { keys: ["d"], words: "Download", view: "clips", run: press("Download") },
    { keys: ["x"], words: "Cancel what is being made", view: "clips", run: cancel },
    { keys: ["Delete"], words: "Delete the clip", view: "clips", run: press("Delete") },
    { keys: [" "], words: "Play or pause", view: "clips", run: () => clips.shown.toggle() },
    { keys: [","], words: "A frame back", view: "clips", run: () => clips.shown.step(-1) },
    { keys: ["."], words: "A frame on", view: "clips", run: () => clips.shown.step(1) },
    { keys: ["j"], words: "The next clip of the gallery", view: "clips", run: neighbour(1) },
    { keys: ["k"], words: "The clip before", view: "clips", run: neighbour(-1) },
    { keys: ["a"], words: "Add a shot", view: "films", run: () => films.editor.add() },
    { keys: ["1"], words: "Clips", run: () => go("clips") },
    { keys: ["2"], words: "Films", run: () => go("films") },
    { keys: ["3"], words: "Jobs", run: () => go("jobs") },
    { keys: ["?"], words: "These keys", run: help },
  ];
}

start();
