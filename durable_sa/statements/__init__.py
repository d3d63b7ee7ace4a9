"""Every statement that the engine and the command line send to durable's tables, one module a subject.

They are module constants with bind parameters, built once: SQLAlchemy finds their compiled form by identity of
structure, and the driver its prepared plan by text. Lists travel as arrays through ``unnest``, so that one statement
serves one item or a thousand. JSON goes in and comes out as text, because the application's engine may have a JSON
serializer of its own.
"""
