"""TODO utils/commands"""
