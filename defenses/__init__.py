"""TODO defenses"""
