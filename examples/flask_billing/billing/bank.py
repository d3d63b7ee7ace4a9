"""The bank, an external service."""


class CardRefusedError(Exception):
    """The bank refused the card, and will refuse it in the next attempt."""


def charge(invoice_id: int, card: str, cents: int) -> str:
    """Take money and return a receipt. The invoice is the bank's idempotency key: two requests take the money once.

    Stands for a call over HTTP.

    Raises:
        CardRefusedError: the bank wants to see another card.
    """
    if card == "expired":
        raise CardRefusedError(f"the bank has refused {card}")
    return f"receipt for {cents} cents, invoice {invoice_id}"
