"""The tables of the application."""

from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKey, MetaData, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from durable_sa import TaskRow


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "%(table_name)s_%(column_0_name)s_idx",
            "uq": "%(table_name)s_%(column_0_name)s_key",
            "ck": "%(table_name)s_%(constraint_name)s_check",
            "fk": "%(table_name)s_%(column_0_name)s_fkey",
            "pk": "%(table_name)s_pkey",
        }
    )


class Order(Base):
    __tablename__ = "orders"
    __table_args__ = (CheckConstraint("refunded BETWEEN 0 AND cents", name="refunded"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]
    item: Mapped[str]
    cents: Mapped[int]
    refunded: Mapped[int] = mapped_column(default=0, server_default="0")


class Turn(Base):
    """A question of a customer, and its answer once there is one."""

    __tablename__ = "turns"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str] = mapped_column(index=True)
    question: Mapped[str]
    answer: Mapped[str | None]
    # Null once durable's retention has deleted the task.
    task_id: Mapped[UUID | None] = mapped_column(ForeignKey(TaskRow.task_id, ondelete="SET NULL"), index=True)
    task: Mapped[TaskRow | None] = relationship(TaskRow, viewonly=True)


class Refund(Base):
    """A refund that the agent wants to make. All refunds of one token are asked for, and answered, together."""

    __tablename__ = "refunds"
    __table_args__ = (UniqueConstraint("token", "call_id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    token: Mapped[str]
    call_id: Mapped[str]
    turn_id: Mapped[int] = mapped_column(ForeignKey(Turn.id))
    order_id: Mapped[int] = mapped_column(ForeignKey(Order.id))
    cents: Mapped[int]
    approved: Mapped[bool | None]
    decided_by: Mapped[str | None]
