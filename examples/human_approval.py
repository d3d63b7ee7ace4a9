"""A task asks a person, and continues without an answer if that takes too long.

It uses the database of DURABLE_DATABASE_URL, else the embedded one: python examples/human_approval.py
"""

import asyncio

from pydantic import BaseModel

from durable_sa import Durable, TaskContext, TaskTimeout, task


class Expense(BaseModel):
    employee: str
    amount: int
    patience: float
    """Seconds to wait for the answer; in production rather days."""


class Decision(BaseModel):
    approved: bool
    by: str


async def ask(employee: str, amount: int) -> None:
    print(f"mail to the manager: may {employee} spend {amount}?")


async def pay(employee: str, amount: int) -> None:
    print(f"paying {amount} to {employee}")


@task
async def reimburse(ctx: TaskContext, expense: Expense) -> str:
    await ctx.step("ask", ask, expense.employee, expense.amount)
    try:
        decision = await ctx.await_event(f"decision:{ctx.task_id}", timeout=expense.patience, type=Decision)
    except TaskTimeout:
        # The timeout is stored like any other outcome: a later answer does not change what has been done.
        return "nobody has answered: back to the employee"
    if not decision.approved:
        return f"refused by {decision.by}"
    await ctx.step("pay", pay, expense.employee, expense.amount)
    return f"approved by {decision.by}"


async def main() -> None:
    async with Durable(queue_name="expenses", tasks=[reimburse]) as durable:
        await durable.migrate()
        await durable.create_queue()
        async with durable.worker():
            for employee, amount, answer in (
                ("Ada", 40, Decision(approved=True, by="Grace")),
                ("Bob", 4000, Decision(approved=False, by="Grace")),
                ("Cleo", 400, None),
            ):
                expense = Expense(employee=employee, amount=amount, patience=60 if answer else 0.5)
                spawned = await durable.spawn(reimburse, expense)
                if answer is not None:
                    # The handler of a link in the mail would do this, before or after the task waits for it.
                    await durable.emit_event(f"decision:{spawned.task_id}", answer)
                result = await durable.wait_for_result(spawned, timeout=30)
                print(f"{employee}: {result.output}")


if __name__ == "__main__":
    asyncio.run(main())
