"""The page's components and where they stand. `ui.page` wires them, `assets/page.css` places them.

Texts come with the first load, in the visitor's language.
"""

import gradio as gr

BRIDGE_JS = """
window.onebox_ask = (data) => trigger('ask', data);
window.onebox_act = (data) => trigger('act', { c: window.onebox.conversation(), ...data });
window.onebox_follow = (c) => trigger('follow', { c });
"""
TASK_MENU = """<label class="ob-sr" for="ob-task-select">${label}</label>
<select id="ob-task-select" aria-label="${label}">${options.map((o) =>
`<option value="${o[0]}" ${o[0] === value ? 'selected' : ''}>${o[1]}</option>`).join('')}</select>"""
TASK_MENU_JS = "element.addEventListener('change', (event) => { props.value = event.target.value; });"


class Layout:
    """The components of the page, inside `blocks`."""

    def __init__(self) -> None:
        self.blocks = gr.Blocks(title="Onebox", analytics_enabled=False, fill_width=True)
        with self.blocks:
            self.bridge = gr.HTML("", js_on_load=BRIDGE_JS, elem_id="ob-bridge")
            self.beacon = gr.HTML("", elem_id="ob-beacon", js_on_load=None)
            self.boot = gr.Textbox(visible="hidden", label="boot")
            self.lang = gr.Textbox("en", visible="hidden", label="language")
            self.current = gr.Textbox(visible="hidden", label="conversation")
            self.key = gr.Textbox(visible="hidden", label="key")
            self.shown = gr.State({})
            self.outcome = gr.State(None)
            self.timer = gr.Timer(2.0, active=False)
            with gr.Row(elem_id="ob-app"):
                with gr.Column(elem_id="ob-side", scale=0):
                    self.side = gr.HTML("", js_on_load=None, elem_id="ob-list")
                with gr.Column(elem_id="ob-main"):
                    self.top = gr.HTML("", js_on_load=None, elem_id="ob-topbar")
                    self.banner = gr.HTML("", js_on_load=None, elem_id="ob-banner")
                    self.hello = gr.HTML("", js_on_load=None, elem_id="ob-hello")
                    self.chatbot = gr.Chatbot(
                        elem_id="ob-chat",
                        container=False,
                        show_label=False,
                        height=None,
                        editable="user",
                        buttons=["copy"],
                        sanitize_html=True,
                        allow_tags=False,
                        layout="bubble",
                        group_consecutive_messages=True,
                        latex_delimiters=[
                            {"left": "$$", "right": "$$", "display": True},
                            {"left": "\\(", "right": "\\)", "display": False},
                            {"left": "\\[", "right": "\\]", "display": True},
                        ],
                    )
                    with gr.Column(elem_id="ob-composer"):
                        self.notice = gr.HTML("", js_on_load=None, elem_id="ob-notice")
                        with gr.Column(elem_id="ob-box"):
                            self.box = gr.Textbox(
                                elem_id="ob-input",
                                show_label=False,
                                container=False,
                                lines=1,
                                max_lines=10,
                                autofocus=True,
                            )
                            with gr.Row(elem_id="ob-actions"):
                                self.task = gr.HTML(
                                    "auto",
                                    html_template=TASK_MENU,
                                    js_on_load=TASK_MENU_JS,
                                    elem_id="ob-task",
                                    apply_default_css=False,
                                    label="",
                                    options=[],
                                )
                                self.send = gr.Button("", elem_id="ob-send", scale=0, min_width=40)
                                self.stop = gr.Button("", elem_id="ob-stop", scale=0, min_width=40)
