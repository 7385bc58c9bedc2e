"""The page that asks for the key, as one string without anything to fetch. Knows no key."""

from __future__ import annotations

from html import escape

_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>neox-lite: key</title>
<style>
  :root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
  body { min-height: 100vh; margin: 0; display: grid; place-items: center;
         background: light-dark(#f7f7f4, #131618); color: light-dark(#1d2124, #e4e7e9) }
  form { width: min(20rem, 86vw); display: grid; gap: .75rem }
  h1 { font-size: 1.25rem; margin: 0 }
  p { margin: 0 }
  input, button { font: inherit; padding: .6rem .75rem; border-radius: .5rem; border: 1px solid #767676 }
  input { background: light-dark(#ffffff, #1a1e21); color: inherit }
  button { background: #1f6b58; border-color: #1f6b58; color: #fff; cursor: pointer }
  :focus-visible { outline: 3px solid light-dark(#1f6b58, #79c9b2); outline-offset: 2px }
  [role=alert] { color: light-dark(#93231b, #ffb4ad) }
</style>
<form method="post" action="/login">
  <h1>neox-lite</h1>
  <label for="key">API key of this server</label>
  <input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
  %s<button>Open</button>
</form>
</html>
"""


def login_page(problem: str = "") -> str:
    return _PAGE % (f'<p role="alert">{escape(problem)}</p>\n  ' if problem else "")
