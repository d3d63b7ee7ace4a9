"""The tables of the application."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import DateTime, ForeignKey, UniqueConstraint, func
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from durable_sa import TaskRow


class Base(DeclarativeBase):
    pass


class Subscription(Base):
    __tablename__ = "subscriptions"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]
    card: Mapped[str]
    status: Mapped[str] = mapped_column(default="trial")
    # Null once durable's retention has deleted the task.
    task_id: Mapped[UUID | None] = mapped_column(ForeignKey(TaskRow.task_id, ondelete="SET NULL"), index=True)
    task: Mapped[TaskRow | None] = relationship(TaskRow, viewonly=True)
    invoices: Mapped[list["Invoice"]] = relationship(order_by="Invoice.month", viewonly=True)


class Invoice(Base):
    __tablename__ = "invoices"
    __table_args__ = (UniqueConstraint("subscription_id", "month"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    subscription_id: Mapped[int] = mapped_column(ForeignKey(Subscription.id))
    month: Mapped[int]
    cents: Mapped[int]
    receipt: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())
