const talk = document.getElementById("talk");

function words(event) {
  if (event.event_kind === "deferred_tool_requests") return "(A colleague looks at it.) ";
  const { part, delta } = event;
  if (event.event_kind === "part_start" && part.part_kind === "text") return part.content;
  if (event.event_kind === "part_delta" && delta.part_delta_kind === "text") return delta.content_delta;
  return "";
}

function follow(id, answer) {
  // By position. A model that is cut off begins anew: what came behind the position of a restart is taken back.
  const events = new Map();
  const source = new EventSource(`/turns/${id}/events`);
  const draw = () => (answer.textContent = [...events.values()].map(words).join(""));
  source.onmessage = (message) => {
    events.set(Number(message.lastEventId), JSON.parse(message.data));
    draw();
  };
  source.addEventListener("restart", (message) => {
    for (const position of events.keys()) if (position > Number(message.data)) events.delete(position);
    draw();
  });
  source.addEventListener("end", async () => {
    source.close();
    const turns = await (await fetch("/turns")).json();
    answer.textContent = turns.find((turn) => turn.id === id).answer ?? "Sorry, that has failed.";
  });
}

function show(turn) {
  const question = document.createElement("dt");
  const answer = document.createElement("dd");
  question.textContent = turn.question;
  answer.textContent = turn.answer;
  talk.append(question, answer);
  if (turn.answer === null) follow(turn.id, answer);
}

document.getElementById("ask").addEventListener("submit", async (submit) => {
  submit.preventDefault();
  const form = submit.target;
  const body = JSON.stringify({ question: form.question.value });
  const headers = { "Content-Type": "application/json" };
  const response = await fetch("/turns", { method: "POST", headers, body });
  if (!response.ok) return;
  form.reset();
  show(await response.json());
});

fetch("/turns").then(async (response) => (await response.json()).forEach(show));
