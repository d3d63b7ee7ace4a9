"""The bank, which is somebody else's service."""


class CardRefusedError(Exception):
    """No use to try the same card again."""


def charge(invoice_id: int, card: str, cents: int) -> str:
    """Take money; a receipt. The invoice is the bank's idempotency key: asking twice takes it once.

    Stands for a call over HTTP.

    Raises:
        CardRefusedError: the bank wants to see another card.
    """
    if card == "expired":
        raise CardRefusedError(f"the bank has refused {card}")
    return f"receipt for {cents} cents, invoice {invoice_id}"
