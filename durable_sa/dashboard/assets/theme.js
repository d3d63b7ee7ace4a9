// Applies the chosen theme before anything is painted.
"use strict";
const chosen = localStorage.getItem("durable-theme");
if (chosen) document.documentElement.dataset.theme = chosen;
