const list = document.getElementById("refunds");

function button(text, refund, approved) {
  const made = document.createElement("button");
  made.textContent = text;
  made.onclick = async () => {
    const body = JSON.stringify({ approved });
    const headers = { "Content-Type": "application/json" };
    await fetch(`/refunds/${refund.id}/verdict`, { method: "PUT", headers, body });
    await load();
  };
  return made;
}

async function load() {
  const refunds = await (await fetch("/refunds")).json();
  list.replaceChildren(
    ...refunds.map((refund) => {
      const item = document.createElement("li");
      item.append(`${refund.cents} cents of order ${refund.order_id} `);
      item.append(button("Refund", refund, true), " ", button("Refuse", refund, false));
      return item;
    }),
  );
}

load();
setInterval(load, 2000);
