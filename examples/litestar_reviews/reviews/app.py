"""Articles over HTTP."""

from dataclasses import dataclass

from litestar import Litestar, get, post, put
from litestar.exceptions import ClientException, NotFoundException
from litestar.handlers import asgi
from litestar.params import FromPath, JSONBody
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from durable_sa import Durable
from durable_sa.dashboard import dashboard

from .mail import Mailer
from .models import Article
from .operators import operator
from .tasks import Verdict, define_schedules, review, verdict_event


@dataclass
class NewArticle:
    title: str
    text: str


@dataclass
class ArticleView:
    id: int
    title: str
    status: str
    findings: list[str]
    reader: str | None

    @classmethod
    def of(cls, article: Article) -> "ArticleView":
        return cls(article.id, article.title, article.status, article.findings, article.reader)


def create_app(sessions: async_sessionmaker[AsyncSession], durable: Durable[Mailer]) -> Litestar:
    @post("/articles")
    async def submit(data: JSONBody[NewArticle]) -> ArticleView:
        async with sessions.begin() as session:
            article = Article(title=data.title, text=data.text)
            session.add(article)
            await session.flush()  # for article.id
            article.task_id = (await durable.spawn_with(session, review, article.id)).task_id
        return ArticleView.of(article)

    @get("/articles/{article_id:int}")
    async def show(article_id: FromPath[int]) -> ArticleView:
        async with sessions() as session:
            return ArticleView.of(await found(session, article_id))

    @put("/articles/{article_id:int}/verdict")
    async def decide(article_id: FromPath[int], data: JSONBody[Verdict]) -> ArticleView:
        async with sessions.begin() as session:
            article = await found(session, article_id)
            if article.status != "reading" or not await durable.emit_event_with(
                session, verdict_event(article_id), {"reader": data.reader, "accepted": data.accepted}
            ):
                raise ClientException(f"The article is {article.status}.", status_code=409)
            article.status = "accepted" if data.accepted else "refused"
            article.reader = data.reader
        return ArticleView.of(article)

    async def found(session: AsyncSession, article_id: int) -> Article:
        article = await session.get(Article, article_id, with_for_update=True)
        if article is None:
            raise NotFoundException
        return article

    async def define() -> None:
        await define_schedules(durable)

    pages = asgi("/durable", is_mount=True, copy_scope=True)(dashboard(durable, auth=operator))
    return Litestar([submit, show, decide, pages], on_startup=[define], on_shutdown=[durable.close])
