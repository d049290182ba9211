"""What a person does on the page, for the tests.

What a test, here or elsewhere, may rely on (`page.get_by_test_id(...)`):

    welcome  example                     the empty state and its example prompts
    input  send  stop  deepthink  search-toggle  attach  file-input  file-chip  remove-file   the composer
    cost  cost-price  price              tokens, cached share, speed and price, under the composer
    thread  question  answer             the conversation; `answer` has data-status = running | done | stopped |
                                         length | cut | error
    answer-text  stats  copy-answer  regenerate  continue  ending  fault  retry
    siblings  sibling-previous  sibling-next
    edit  edit-input  edit-send
    thinking  thinking-toggle  thinking-text  stop-thinking  edit-thought  thought-input  thought-go
    search  queries  open-sources  citation  sources  source  claim  verdicts
    code-block  copy-code  preview  preview-panel  preview-frame  tab-source  preview-download  panel-close
    formula  diagram  jump
    sidebar  menu  hide-sidebar  new-chat  search-chats  chat  match  chat-menu  rename  rename-input  pin
    export-markdown  export-json  delete-chat  toast  undo  more-chats  thread-menu
    model  model-choice  parameters-button  parameters  system  temperature  top_p  max-tokens
    settings-button  theme-light|dark|system  language-en|zh  import-input  shortcuts  forget-key
    palette  palette-input  palette-entry  keys
    key-dialog  key-input  key-save      asks for the API key after a 401
    notice                               above the composer: no server, no connection
"""

from __future__ import annotations

from playwright.sync_api import Locator, Page, expect


def ask(page: Page, text: str, status: str | None = "done") -> Locator:
    """Sends a message and returns its answer, once it has the status (None: as soon as it is there)."""
    answers = page.get_by_test_id("answer")
    before = answers.count()
    page.get_by_test_id("input").fill(text)
    page.get_by_test_id("input").press("Enter")
    answer = answers.nth(before)
    if status is None:
        answer.wait_for()
    else:
        expect(answer).to_have_attribute("data-status", status, timeout=20_000)
    return answer


def choose(button: Locator) -> None:
    """By the keyboard. When an answer has just ended, the colours of its code may still arrive: the page then keeps its end
    in view, and a pointer that was aimed before hits something else."""
    button.press("Enter")


def new_chat(page: Page) -> None:
    """To the empty state; what was shown before is gone when this returns."""
    page.get_by_test_id("new-chat").click()
    expect(page.get_by_test_id("welcome")).to_be_visible()
    expect(page.get_by_test_id("answer")).to_have_count(0)


def menu(page: Page, row: Locator, item: str) -> None:
    """Chooses from the menu of a chat in the sidebar."""
    row.hover()
    row.get_by_test_id("chat-menu").click()
    page.get_by_test_id(item).click()
