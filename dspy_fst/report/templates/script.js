// A link to a candidate opens it.
function reveal() {
  const target = document.getElementById(location.hash.slice(1));
  const box = target && target.closest("details");
  if (box) {
    box.open = true;
    box.scrollIntoView({ block: "nearest" });
    box.querySelector("summary").focus({ preventScroll: true });
  }
}
addEventListener("hashchange", reveal);
document.addEventListener("click", (event) => {
  const link = event.target.closest("a");
  if (link && location.hash && link.getAttribute("href") === location.hash) reveal();
});
reveal();

// One step's trajectories at a time; without this script all of them are shown.
for (const chooser of document.querySelectorAll(".chooser")) {
  const select = chooser.querySelector("select");
  const steps = document.querySelectorAll(`.step[data-run="${select.dataset.run}"]`);
  const show = () => steps.forEach((step) => (step.hidden = step.dataset.step !== select.value));
  select.addEventListener("change", show);
  chooser.hidden = false;
  show();
}
