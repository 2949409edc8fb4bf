"""Every text of the page, in English and Chinese. A test holds both complete; nothing here comes from a model."""

from dataclasses import dataclass
from typing import Literal

from onebox.plugin import Lang


@dataclass(frozen=True, slots=True)
class Strings:
    """One language's texts. Braces are filled by `str.format`."""

    lang: Lang
    html_lang: str
    greeting: str
    greeting_hint: str
    placeholder: str
    message_label: str
    send: str
    stop: str
    new_chat: str
    chats: str
    no_chats: str
    untitled: str
    rename: str
    delete: str
    delete_confirm: str
    export_markdown: str
    export_json: str
    more: str
    open_sidebar: str
    close_sidebar: str
    theme: str
    other_language: str
    task_menu: str
    auto: str
    raw: str
    chip_hint: str
    chip_again: str
    chip_why: str
    ask_back: str
    plan: str
    plan_remove: str
    plan_up: str
    learn: str
    learn_hint: str
    noted: str
    noted_undo: str
    chip_chosen: str
    unsure: str
    variant: str
    previous_variant: str
    next_variant: str
    thinking: str
    stopped: str
    stopped_after: str
    stopped_receipt: str
    cut: str
    waiting: str
    waiting_stopped: str
    queued: str
    queued_for: str
    loading_banner: str
    loading_hint: str
    down_banner: str
    down_hint: str
    page_away: str
    retry: str
    dismiss: str
    unknown_command: str
    empty_command: str
    progress: str
    check_passed: str
    check_failed: str
    announce_done: str
    announce_stopped: str
    announce_failed: str
    chat_label: str
    copy: str
    copied: str
    error_overloaded: str
    error_rate_limited: str
    error_too_long: str
    error_engine: str
    error_timeout: str
    error_unavailable: str
    error_gone: str
    error_conflict: str
    error_key: str
    error_other: str
    details: str


EN = Strings(
    lang="en",
    html_lang="en",
    greeting="What shall we work on?",
    greeting_hint="Ask, summarize, translate, reason or write. The right task is picked for you.",
    placeholder="Write a message…  / for tasks",
    message_label="Message",
    send="Send",
    stop="Stop",
    new_chat="New chat",
    chats="Chats",
    no_chats="Your chats will appear here.",
    untitled="Untitled chat",
    rename="Rename",
    delete="Delete",
    delete_confirm="Delete for good?",
    export_markdown="Export as Markdown",
    export_json="Export as JSON",
    more="More for “{title}”",
    open_sidebar="Open the list of chats",
    close_sidebar="Close the list of chats",
    theme="Light or dark",
    other_language="中文",
    task_menu="Task",
    auto="Auto",
    raw="Model",
    chip_hint="Task of this reply. Open to answer it as another task.",
    chip_again="Answer as…",
    chip_why="Words that decided",
    ask_back="Or did you mean",
    plan="Steps of this reply",
    plan_remove="Leave this step out",
    plan_up="Do this step earlier",
    learn="Learn from my corrections",
    learn_hint="Picking another task or changing the steps teaches the router about messages like this one.",
    noted="Noted for messages like this",
    noted_undo="Undo",
    chip_chosen="your choice",
    unsure="The router was not sure",
    variant="{number} / {total}",
    previous_variant="Previous answer",
    next_variant="Next answer",
    thinking="Working on it…",
    stopped="Stopped. The text above is kept.",
    stopped_after="Stopped after {tokens} tokens. The text above is kept.",
    stopped_receipt="Stopped after {tokens} tokens; slot free after {ms} ms. The text above is kept.",
    cut="The reply reached its length limit.",
    waiting="The model is loading. Your message is kept and will be sent as soon as it is ready ({seconds} s).",
    waiting_stopped="Not sent. Your message is still in the box.",
    queued="Waiting: place {position}",
    queued_for="Waiting: place {position}, about {seconds} s",
    loading_banner="The model is loading",
    loading_hint="You can write already; your message goes out when it is ready.",
    down_banner="The server does not answer yet",
    down_hint="It may still be starting. You can write already; your message goes out when it is there.",
    page_away="Reconnecting. Your reply goes on meanwhile, and your text is kept.",
    retry="Try again",
    dismiss="Dismiss",
    unknown_command="There is no task /{name}. Known: {known}. Choose one of these or leave out the slash.",
    empty_command="Write the text after /{name}.",
    progress="{label} · {done} of {total}",
    check_passed="Check passed",
    check_failed="Check failed",
    announce_done="Reply finished",
    announce_stopped="Reply stopped",
    announce_failed="The reply failed",
    chat_label="Conversation",
    copy="Copy",
    copied="Copied",
    error_overloaded="Too busy right now: every slot of the model is taken. Wait a moment and try again.",
    error_rate_limited="Many of your replies are waiting already. Wait for some of them to end, then try again.",
    error_too_long="The conversation and your message are longer than the model can read. "
    "Shorten the message or start a new chat.",
    error_engine="The model broke off this reply. What it wrote is kept. Try again to get a whole one.",
    error_timeout="The model took too long, so the reply was given up. Try again, or ask for something shorter.",
    error_unavailable="The model cannot be reached at the moment. Your message is kept. Try again shortly.",
    error_gone="This chat no longer exists on the server. Start a new one.",
    error_conflict="Another reply is still being written in this chat. Wait for it or stop it, then try again.",
    error_key="The server does not accept this page's key. Restart the page together with the server.",
    error_other="This reply could not be written because something went wrong on the server. "
    "Try again; if it happens again, the server's log has the cause.",
    details="Details",
)

ZH = Strings(
    lang="zh",
    html_lang="zh-CN",
    greeting="今天想做点什么？",
    greeting_hint="提问、总结、翻译、推理或写作，系统会自动选择合适的任务。",
    placeholder="输入消息…  输入 / 选择任务",
    message_label="消息",
    send="发送",
    stop="停止",
    new_chat="新对话",
    chats="对话",
    no_chats="对话会显示在这里。",
    untitled="未命名对话",
    rename="重命名",
    delete="删除",
    delete_confirm="确定永久删除？",
    export_markdown="导出为 Markdown",
    export_json="导出为 JSON",
    more="“{title}”的更多操作",
    open_sidebar="打开对话列表",
    close_sidebar="关闭对话列表",
    theme="浅色或深色",
    other_language="English",
    task_menu="任务",
    auto="自动",
    raw="模型",
    chip_hint="这条回复的任务。点开可换一种任务重新回答。",
    chip_again="换一种任务回答…",
    chip_why="起决定作用的词",
    ask_back="或者你是想",
    plan="这条回复的步骤",
    plan_remove="去掉这一步",
    plan_up="提前这一步",
    learn="从我的更正中学习",
    learn_hint="换一种任务或改动步骤后，路由会记住，类似的消息照此处理。",
    noted="已记住，以后类似的消息照此处理",
    noted_undo="撤销",
    chip_chosen="手动选择",
    unsure="路由不太确定",
    variant="{number} / {total}",
    previous_variant="上一个回答",
    next_variant="下一个回答",
    thinking="正在处理…",
    stopped="已停止，上面的内容已保留。",
    stopped_after="已停止：生成了 {tokens} 个 token，上面的内容已保留。",
    stopped_receipt="已停止：生成了 {tokens} 个 token，{ms} 毫秒后释放了位置，上面的内容已保留。",
    cut="回复已达到长度上限。",
    waiting="模型正在加载。消息已保留，加载完成后会自动发送（{seconds} 秒）。",
    waiting_stopped="未发送，消息仍在输入框里。",
    queued="排队中：第 {position} 位",
    queued_for="排队中：第 {position} 位，约 {seconds} 秒",
    loading_banner="模型正在加载",
    loading_hint="现在就可以输入，加载完成后会自动发送。",
    down_banner="服务器暂时没有响应",
    down_hint="可能还在启动。现在就可以输入，连接后会自动发送。",
    page_away="正在重新连接。回复仍在继续，输入的内容已保留。",
    retry="重试",
    dismiss="关闭",
    unknown_command="没有名为 /{name} 的任务。可用：{known}。请选择其中之一，或去掉斜杠。",
    empty_command="请在 /{name} 后面输入内容。",
    progress="{label} · {done}/{total}",
    check_passed="检查通过",
    check_failed="检查未通过",
    announce_done="回复完成",
    announce_stopped="回复已停止",
    announce_failed="回复失败",
    chat_label="对话内容",
    copy="复制",
    copied="已复制",
    error_overloaded="现在太忙：模型的所有位置都被占用。请稍等片刻再试。",
    error_rate_limited="您已有多条回复在排队。请等其中一些结束后再试。",
    error_too_long="对话加上这条消息超出了模型能读的长度。请缩短消息，或开始新对话。",
    error_engine="模型中断了这条回复。已写出的内容已保留，重试可得到完整回复。",
    error_timeout="模型用时过长，回复已放弃。请重试，或提出更短的要求。",
    error_unavailable="暂时连不上模型。消息已保留，请稍后重试。",
    error_gone="这个对话在服务器上已不存在。请开始新对话。",
    error_conflict="这个对话里还有一条回复正在生成。请等它结束或停止它，再重试。",
    error_key="服务器不接受本页面的密钥。请将页面与服务器一起重启。",
    error_other="服务器出了问题，没能写出回复。请重试；如果再次出现，原因在服务器日志里。",
    details="详情",
)

LANGUAGES: dict[Lang, Strings] = {"en": EN, "zh": ZH}


def strings(lang: str) -> Strings:
    """The texts of `lang`; English for anything but Chinese."""
    return ZH if lang == "zh" else EN


def pick_language(saved: str | None, accept_language: str | None) -> Lang:
    """The language a visitor chose before, else the first of the browser's list that the page speaks."""
    if saved in LANGUAGES:
        return "zh" if saved == "zh" else "en"
    ranked: list[tuple[float, int, Literal["en", "zh"]]] = []
    for position, part in enumerate((accept_language or "").split(",")):
        tag, _, quality = part.strip().partition(";q=")
        primary = tag.split("-")[0].lower()
        try:
            weight = float(quality) if quality else 1.0
        except ValueError:
            continue
        if primary == "zh":
            ranked.append((-weight, position, "zh"))
        elif primary == "en":
            ranked.append((-weight, position, "en"))
    return min(ranked)[2] if ranked else "en"
