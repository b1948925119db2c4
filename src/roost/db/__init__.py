"""The one database: engine, tables, migrations. Only the server opens it."""
