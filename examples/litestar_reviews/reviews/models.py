"""The tables of the application."""

from uuid import UUID

from sqlalchemy import ARRAY, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


class Article(Base):
    __tablename__ = "articles"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    text: Mapped[str]
    status: Mapped[str] = mapped_column(default="submitted")
    findings: Mapped[list[str]] = mapped_column(ARRAY(String()), default=list)
    reader: Mapped[str | None]
    task_id: Mapped[UUID | None]
