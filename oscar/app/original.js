// The original is sent once; the viewer shows it beside many results.
watch("value", () => document.dispatchEvent(new CustomEvent("oscar-original", { detail: props.value })));
