"""The tables of the registry. What changes here gets a migration beside this file."""

from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

HEAD = "0001"  # the newest migration

# So that PostgreSQL orders names as SQLite and Python do, by their characters' numbers.
_NAME = String(255).with_variant(String(255, collation="C"), "postgresql")
# SQLite counts up by itself only in columns of this very type.
_ID = BigInteger().with_variant(Integer, "sqlite")

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)

# Files of adapters, each once, under the SHA-256 of their bytes.
blobs = Table(
    "blobs",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("size", Integer, nullable=False),
    Column("bytes", LargeBinary, nullable=False),
)

# Who owns names; the operator is "".
tenants = Table(
    "tenants",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("name", _NAME, nullable=False, unique=True),
    Column("created_us", BigInteger, nullable=False),
    sqlite_autoincrement=True,
)

# Names. `latest` is the newest version that is there, `last` the newest that there ever was.
adapters = Table(
    "adapters",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("tenant_id", ForeignKey(tenants.c.id), nullable=False),
    Column("name", _NAME, nullable=False, unique=True),
    Column("latest", Integer, nullable=False),
    Column("last", Integer, nullable=False),
    Index(None, "tenant_id", "name"),
    sqlite_autoincrement=True,
)

# Immutable; `parent` is the digest that was the newest before.
versions = Table(
    "versions",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("adapter_id", ForeignKey(adapters.c.id), nullable=False),
    Column("number", Integer, nullable=False),
    Column("digest", String(71), nullable=False, index=True),
    Column("sha256", ForeignKey(blobs.c.sha256), nullable=False, index=True),
    Column("base_fingerprint", Text, nullable=False),
    Column("config", Text, nullable=False),
    Column("num_sites", Integer, nullable=False),
    Column("num_parameters", BigInteger, nullable=False),
    Column("num_head_parameters", BigInteger, nullable=False),
    Column("parent", String(71), nullable=False),
    Column("who", _NAME, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    UniqueConstraint("adapter_id", "number"),
    sqlite_autoincrement=True,
)

# Names of versions that can be moved.
aliases = Table(
    "aliases",
    metadata,
    Column("adapter_id", ForeignKey(adapters.c.id), primary_key=True),
    Column("name", _NAME, primary_key=True),
    Column("version_id", ForeignKey(versions.c.id), nullable=False, index=True),
    Column("created_us", BigInteger, nullable=False),
)

# What was changed, by whom and when; rows are only ever added.
audit = Table(
    "audit",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("at_us", BigInteger, nullable=False),
    Column("who", _NAME, nullable=False),
    Column("action", String(32), nullable=False),
    Column("adapter", _NAME, nullable=False),
    Column("version", Integer),
    Column("alias", _NAME),
    Column("digest", String(71)),
    sqlite_autoincrement=True,
)
