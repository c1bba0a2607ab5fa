"use strict";
// Two images of one size, one over the other with a handle between them; zoom and pan hold for both.

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

/**
 * Bring the elements of a stage to life: #stage, #handle, #left-layer and #right-layer with an image each, and the zoom buttons.
 * The function that it returns shows images of another size, which fit the stage at first.
 */
function startStage(root) {
  const byId = (id) => root.querySelector(`#${id}`);
  const stage = byId("stage"), handle = byId("handle"), layers = [byId("left-layer"), byId("right-layer")];
  const images = layers.map((layer) => layer.querySelector("img"));
  let width = 1, height = 1, split = 50;
  let zoom = 1, originX = 0, originY = 0; // stage pixels per image pixel, and the image's corner on the stage

  function divide(percent) {
    split = clamp(percent, 0, 100);
    layers[0].style.clipPath = `inset(0 ${100 - split}% 0 0)`;
    layers[1].style.clipPath = `inset(0 0 0 ${split}%)`;
    handle.style.left = `${split}%`;
    handle.setAttribute("aria-valuenow", split.toFixed(0));
    handle.setAttribute("aria-valuetext", `${split.toFixed(0)} % left image`);
  }

  const fit = () => stage.clientWidth / width;
  const isFit = () => zoom <= fit() * 1.001;

  /** Zoom so that the image's pixel at stage position (x, y) stays there. */
  function zoomTo(value, x = stage.clientWidth / 2, y = stage.clientHeight / 2) {
    const next = clamp(value, fit(), Math.max(32, 4 * fit()));
    originX = x - (x - originX) * next / zoom;
    originY = y - (y - originY) * next / zoom;
    zoom = next;
    place();
  }

  function place() {
    originX = clamp(originX, stage.clientWidth - width * zoom, 0);
    originY = clamp(originY, stage.clientHeight - height * zoom, 0);
    for (const image of images) {
      Object.assign(image.style, { left: `${originX}px`, top: `${originY}px`, width: `${width * zoom}px`, height: `${height * zoom}px` });
    }
    stage.classList.toggle("zoomed", !isFit());
    stage.classList.toggle("pixels", zoom >= 2);
    byId("zoom").textContent = `${Math.round(100 * zoom)} %`;
  }

  function reset() {
    [zoom, originX, originY] = [fit(), 0, 0];
    place();
  }

  // Pointers: one drags the handle (or, zoomed in, the image), two pinch.
  const pointers = new Map();
  let dragsHandle = false;
  const at = (event) => {
    const box = stage.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  };
  stage.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    stage.setPointerCapture(event.pointerId);
    if (!pointers.size) dragsHandle = event.target === handle || isFit();
    pointers.set(event.pointerId, at(event));
  });
  stage.addEventListener("pointermove", (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) return;
    const now = at(event);
    const [second] = [...pointers].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
    pointers.set(event.pointerId, now);
    if (second) {
      const spread = (place) => Math.max(Math.hypot(place.x - second.x, place.y - second.y), 1);
      zoomTo(zoom * spread(now) / spread(before), (now.x + second.x) / 2, (now.y + second.y) / 2);
    } else if (dragsHandle) {
      divide(100 * now.x / stage.clientWidth);
    } else {
      originX += now.x - before.x;
      originY += now.y - before.y;
      place();
    }
  });
  for (const type of ["pointerup", "pointercancel"]) stage.addEventListener(type, (event) => pointers.delete(event.pointerId));
  stage.addEventListener("dblclick", (event) => (isFit() ? zoomTo(4 * fit(), at(event).x, at(event).y) : reset()));
  stage.addEventListener("wheel", (event) => {
    if (event.deltaY > 0 && isFit()) return; // the page scrolls on
    event.preventDefault();
    zoomTo(zoom * Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.002)), at(event).x, at(event).y);
  }, { passive: false });

  handle.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: -2, ArrowDown: -2, ArrowRight: 2, ArrowUp: 2, PageDown: -10, PageUp: 10, Home: -100, End: 100 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    event.stopPropagation(); // the stage would pan
    divide(split + moves[event.key]);
  });
  stage.addEventListener("keydown", (event) => {
    const pan = { ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40] }[event.key];
    if (pan && !isFit()) {
      originX += pan[0];
      originY += pan[1];
      place();
    } else if (event.key === "+" || event.key === "=") zoomTo(zoom * 1.5);
    else if (event.key === "-") zoomTo(zoom / 1.5);
    else if (event.key === "0") reset();
    else return;
    event.preventDefault();
  });
  byId("zoom-in").addEventListener("click", () => zoomTo(zoom * 1.5));
  byId("zoom-out").addEventListener("click", () => zoomTo(zoom / 1.5));
  byId("zoom-fit").addEventListener("click", reset);
  byId("zoom-actual").addEventListener("click", () => zoomTo(1));

  divide(split);
  let available = stage.clientWidth;
  new ResizeObserver(() => {
    if (stage.clientWidth === available) return;
    available = stage.clientWidth;
    reset();
  }).observe(stage);

  return (size) => {
    ({ width, height } = size);
    stage.style.setProperty("--ratio", width / height);
    reset();
  };
}
