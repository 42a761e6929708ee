// Buttons of cards, wherever they stand: data-press says whose and which. Every press has a number of its
// own, so that the same one twice is heard twice.
document.addEventListener("click", event => {
  const button = event.target.closest("[data-press]");
  if (!button) return;
  props.value = { press: button.dataset.press, number: performance.now() };
  trigger("input");
});
