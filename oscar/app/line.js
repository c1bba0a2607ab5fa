// One line of text: what is open, or what is wrong.
const line = element.querySelector("#line");
function show() {
  line.textContent = props.value ? props.value.text : "";
  line.classList.toggle("wrong", Boolean(props.value && props.value.wrong));
}
watch("value", show);
