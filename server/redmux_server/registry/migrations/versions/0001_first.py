"""Blobs, tenants, adapters, versions, aliases and the audit."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_NAME = sa.String(255).with_variant(sa.String(255, collation="C"), "postgresql")
_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Makes the first tables."""
    op.create_table(
        "audit",
        sa.Column("id", _ID, nullable=False),
        sa.Column("at_us", sa.BigInteger(), nullable=False),
        sa.Column("who", _NAME, nullable=False),
        sa.Column("action", sa.String(length=32), nullable=False),
        sa.Column("adapter", _NAME, nullable=False),
        sa.Column("version", sa.Integer(), nullable=True),
        sa.Column("alias", _NAME, nullable=True),
        sa.Column("digest", sa.String(length=71), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "blobs",
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("bytes", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("sha256", name="pk_blobs"),
    )
    op.create_table(
        "tenants",
        sa.Column("id", _ID, nullable=False),
        sa.Column("name", _NAME, nullable=False),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_tenants"),
        sa.UniqueConstraint("name", name="uq_tenants_name"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "adapters",
        sa.Column("id", _ID, nullable=False),
        sa.Column("tenant_id", _ID, nullable=False),
        sa.Column("name", _NAME, nullable=False),
        sa.Column("latest", sa.Integer(), nullable=False),
        sa.Column("last", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_adapters_tenant_id"),
        sa.PrimaryKeyConstraint("id", name="pk_adapters"),
        sa.UniqueConstraint("name", name="uq_adapters_name"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_adapters_tenant_id_name", "adapters", ["tenant_id", "name"], unique=False)
    op.create_table(
        "versions",
        sa.Column("id", _ID, nullable=False),
        sa.Column("adapter_id", _ID, nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("base_fingerprint", sa.Text(), nullable=False),
        sa.Column("config", sa.Text(), nullable=False),
        sa.Column("num_sites", sa.Integer(), nullable=False),
        sa.Column("num_parameters", sa.BigInteger(), nullable=False),
        sa.Column("num_head_parameters", sa.BigInteger(), nullable=False),
        sa.Column("parent", sa.String(length=71), nullable=False),
        sa.Column("who", _NAME, nullable=False),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name="fk_versions_adapter_id"),
        sa.ForeignKeyConstraint(["sha256"], ["blobs.sha256"], name="fk_versions_sha256"),
        sa.PrimaryKeyConstraint("id", name="pk_versions"),
        sa.UniqueConstraint("adapter_id", "number", name="uq_versions_adapter_id_number"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_versions_digest", "versions", ["digest"], unique=False)
    op.create_index("ix_versions_sha256", "versions", ["sha256"], unique=False)
    op.create_table(
        "aliases",
        sa.Column("adapter_id", _ID, nullable=False),
        sa.Column("name", _NAME, nullable=False),
        sa.Column("version_id", _ID, nullable=False),
        sa.Column("created_us", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name="fk_aliases_adapter_id"),
        sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name="fk_aliases_version_id"),
        sa.PrimaryKeyConstraint("adapter_id", "name", name="pk_aliases"),
    )
    op.create_index("ix_aliases_version_id", "aliases", ["version_id"], unique=False)
