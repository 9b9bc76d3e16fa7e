"""TODO utils"""
