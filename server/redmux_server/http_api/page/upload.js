// Uploading an adapter: a file that is chosen or dropped, under a name.

import { putAdapter } from "./api.js";

const find = (id) => document.getElementById(id);
let file = null;

// `onPut` is told the name of what was published.
export function setUp(onPut, showError) {
  find("file").addEventListener("change", () => choose(find("file").files[0]));
  const drop = find("drop");
  for (const kind of ["dragover", "drop"]) {
    document.addEventListener(kind, (event) => {
      // A file that misses the field must not replace the page.
      if (event.dataTransfer?.types.includes("Files")) event.preventDefault();
    });
  }
  drop.addEventListener("dragover", () => drop.classList.add("is-over"));
  drop.addEventListener("dragleave", () => drop.classList.remove("is-over"));
  drop.addEventListener("drop", (event) => {
    drop.classList.remove("is-over");
    find("file").files = event.dataTransfer.files;
    choose(event.dataTransfer.files[0]);
  });
  find("name").addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault(); // else it would send the prompt
    if (!event.ctrlKey && !event.metaKey) put();
  });
  find("put").addEventListener("click", put);

  async function put() {
    showError("upload-error", "");
    find("upload-said").textContent = "";
    const name = find("name").value.trim();
    if (!file) return showError("upload-error", "Choose a file first.");
    if (!name) return showError("upload-error", "Give the adapter a name.");
    find("put").disabled = true;
    find("upload-said").textContent = "Uploading …";
    try {
      const told = await putAdapter(name, file, find("replace").checked);
      await onPut(told.id);
      find("upload-said").textContent =
        `${told.id} is served: ${told.num_sites} sites, ${told.num_parameters.toLocaleString("en")} numbers.`;
    } catch (err) {
      find("upload-said").textContent = "";
      showError("upload-error", err.message);
    } finally {
      find("put").disabled = false;
    }
  }
}

function choose(chosen) {
  file = chosen ?? null;
  if (file) find("name").value = file.name.replace(/\.safetensors$/, "");
}
