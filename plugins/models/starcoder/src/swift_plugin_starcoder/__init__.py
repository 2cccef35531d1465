"""StarCoder and SantaCoder of BigCode."""
